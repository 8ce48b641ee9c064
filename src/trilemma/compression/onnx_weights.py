"""Float weights of an ONNX graph replaced by few bits and what unpacks them, in place.

int4 levels are cast and multiplied by their scales rather than given to DequantizeLinear: ONNX Runtime works plain
operations on constants out once, when it loads a file, and dequantises anew in every call.
"""

from collections.abc import Mapping

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

from trilemma.compression.stored_weights import Stored

#: The first opset that casts from int4.
INT4_OPSET = 21
_INT4_IR = 10


def store_in_few_bits(model: ModelProto, stored: Mapping[str, Stored]) -> ModelProto:
    """Returns the model with those of its weights that are named replaced.

    Args:
        model: Whose constants are still called as the network's parameters are.
        stored: Name -> as it is stored.

    Raises:
        ValueError: Where the graph has no such constant, nor its transpose.
    """
    if any(one.bits == 4 for one in stored.values()):
        metadata = {prop.key: prop.value for prop in model.metadata_props}
        model = version_converter.convert_version(model, INT4_OPSET)
        model.ir_version = max(model.ir_version, _INT4_IR)
        helper.set_model_props(model, metadata)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    others = {name: tensor for name, tensor in constants.items() if name not in stored}
    written = [one for name, one in stored.items() if name in constants]
    for name, one in stored.items():
        place = name if name in constants else _transpose_of(one, others)
        if place is None:
            # The exporter keeps one of several equal constants: of layers that were pruned away, for example.
            if any(torch.equal(one.weight(), other.weight()) for other in written):
                continue
            raise ValueError(f"The exported graph has no weight '{name}', so it cannot be stored in {one.bits} bits.")
        others.pop(place, None)
        written.append(one)
        graph.initializer.remove(constants[place])
        tensors, nodes = _unpacked(name, one)
        if place != name:
            nodes.append(helper.make_node("Transpose", [name], [place], perm=[1, 0]))
        graph.initializer.extend(tensors)
        for position, node in enumerate(nodes):
            graph.node.insert(position, node)
    return model


def _transpose_of(one: Stored, constants: Mapping[str, TensorProto]) -> str | None:
    """Returns the constant that holds a matrix transposed: how a linear layer on sequences is written."""
    if len(one.shape) != 2:
        return None
    turned = one.weight().T.numpy()
    for name, constant in constants.items():
        if tuple(constant.dims) == turned.shape and np.array_equal(numpy_helper.to_array(constant), turned):
            return name
    return None


def _unpacked(name: str, one: Stored) -> tuple[list[TensorProto], list[NodeProto]]:
    """Returns the constants that stand for a weight, and the nodes that make it of them."""
    levels = f"{name}/levels"
    if one.scale_OG is None:
        raw = one.levels_OGg.contiguous().view(torch.int16).numpy().astype("<i2").tobytes()
        made = helper.make_tensor(levels, TensorProto.BFLOAT16, list(one.shape), raw, raw=True)
        return [made], [helper.make_node("Cast", [levels], [name], to=TensorProto.FLOAT)]
    num_channels, per_channel = one.shape[0], one.shape[1:].numel()
    scale = numpy_helper.from_array(one.scale_OG.numpy()[..., None], f"{name}/scale")
    whole = numpy_helper.from_array(np.array([num_channels, -1], dtype=np.int64), f"{name}/flat_shape")
    shape = numpy_helper.from_array(np.array(one.shape, dtype=np.int64), f"{name}/shape")
    nodes = [
        helper.make_node("Cast", [levels], [f"{name}/whole"], to=TensorProto.FLOAT),
        helper.make_node("Cast", [scale.name], [f"{name}/worth"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}/whole", f"{name}/worth"], [f"{name}/groups"]),
    ]
    tensors, last = [_integers(levels, one), scale, shape], f"{name}/groups"
    if one.levels_OGg.shape[1:].numel() != per_channel:  # the last group is filled up
        ends = [numpy_helper.from_array(np.array([n], dtype=np.int64), f"{name}/{w}") for w, n in _cut(per_channel)]
        tensors += [whole, *ends]
        nodes += [
            helper.make_node("Reshape", [last, whole.name], [f"{name}/flat"]),
            helper.make_node("Slice", [f"{name}/flat", *(end.name for end in ends)], [f"{name}/cut"]),
        ]
        last = f"{name}/cut"
    return tensors, [*nodes, helper.make_node("Reshape", [last, shape.name], [name])]


def _cut(per_channel: int) -> list[tuple[str, int]]:
    return [("start", 0), ("end", per_channel), ("axis", 1)]


def _integers(name: str, one: Stored) -> TensorProto:
    if one.bits == 8:
        return numpy_helper.from_array(one.levels_OGg.numpy(), name)
    flat = one.levels_OGg.numpy().flatten()
    nibbles = np.append(flat, 0)[: len(flat) + len(flat) % 2].astype(np.uint8) & 0xF
    packed = (nibbles[::2] | nibbles[1::2] << 4).tobytes()  # the first of two in the lower half, as ONNX has it
    return helper.make_tensor(name, TensorProto.INT4, list(one.levels_OGg.shape), packed, raw=True)
