"""ONNX export: the bytes of a model as it would be shipped.

The graph takes images in [0, 1] under the name "image" and returns "logits"; the normalisation is part of it. An
int8 twin becomes a graph of QuantizeLinear/DequantizeLinear pairs in which weights are stored as int8 and biases as
int32, which ONNX Runtime fuses to integer operations. What is claimed of a model stands in the file as metadata.
"""

import copy
import io
import warnings
from collections.abc import Mapping

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import nn
from torch.jit._trace import TracerWarning

from trilemma.compression.folding import fold_weight_standardisation, is_identity
from trilemma.compression.onnx_weights import store_in_few_bits
from trilemma.compression.stored_weights import stored_weights
from trilemma.models.classifier import Classifier

OPSET = 17
_WEIGHTED = ("Conv", "Gemm")


def export_onnx(
    classifier: Classifier, channels: int, image_size: int, properties: Mapping[str, str] | None = None
) -> bytes:
    """Returns a classifier as an ONNX model with a free batch size; equal arguments give equal bytes.

    Args:
        classifier: A float network or an int8 twin; unchanged.
        channels: C of its images.
        image_size: H and W of its images, in pixels.
        properties: What the file shall say of itself, as its metadata; the computation is the same without.
    """
    network = _prepared(copy.deepcopy(classifier).cpu().eval())
    image = torch.full((2, channels, image_size, image_size), 0.5)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The newer exporter does not know torch.fake_quantize_*; this one's shape checks warn where nothing is wrong.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=TracerWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx.*")
        torch.onnx.export(
            network,
            (image,),
            buffer,  # pyright: ignore[reportArgumentType] - a stream is accepted by this exporter
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
    model = onnx.load_from_string(buffer.getvalue())
    _store_integers(model)
    model = store_in_few_bits(model, stored_weights(network))
    _shorten_names(model)
    helper.set_model_props(model, dict(sorted((properties or {}).items())))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def _prepared(network: Classifier) -> Classifier:
    """Folds standardised weights, takes out the batch norms that were folded, writes "same" padding as numbers."""
    fold_weight_standardisation(network)
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if is_identity(module):
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, nn.Identity())
        elif isinstance(module, nn.Conv2d) and module.padding == "same":
            spans = [step * (size - 1) for step, size in zip(module.dilation, module.kernel_size, strict=True)]
            if not any(span % 2 for span in spans):  # ONNX Runtime knows "same" without dilation only
                module.padding = (spans[0] // 2, spans[1] // 2)
    return network


def _store_integers(model: ModelProto) -> None:
    """Replaces quantised float weights by int8 ones and their biases by int32 ones, in place."""
    graph = model.graph
    _resolve_identities(model)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    for node in list(graph.node):
        if node.op_type == "QuantizeLinear" and node.input[0] in constants:
            _store_weight(model, node, constants)
    for node in list(graph.node):
        if node.op_type in _WEIGHTED and len(node.input) == 3 and node.input[2] in constants:
            _store_bias(model, node, constants, made_by)
    _round_once(model)
    _drop_unused(model)


def _round_once(model: ModelProto) -> None:
    """Takes out ReLUs of levels that start at zero, and rounding to levels on which numbers lie already, in place.

    Neither changes a number, and either would end a chain of integer operations: ONNX Runtime itself takes out a ReLU
    only right before rounding.
    """
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    grids: dict[str, tuple[float, int]] = {}  # of the values that lie on one
    pools: dict[str, NodeProto] = {}
    for node in list(graph.node):  # in an order in which every value is made before it is read
        grid = grids.get(node.input[0]) if node.input else None
        if node.op_type == "DequantizeLinear" and node.input[0] not in constants:
            grids[node.output[0]] = _grid(node, constants)
        elif node.op_type == "Relu" and grid is not None and grid[1] == 0:
            _bypass(model, node, node.output[0])
        elif node.op_type == "MaxPool" and grid is not None:
            grids[node.output[0]] = grid
            pools[node.output[0]] = node
        elif node.op_type == "QuantizeLinear" and grid is not None and grid == _grid(node, constants):
            (dequantise,) = _readers(model, node.output[0])
            if node.input[0] in pools:
                _read_rounded(model, pools[node.input[0]], node, dequantise)
            else:
                _bypass(model, node, dequantise.output[0])
                graph.node.remove(dequantise)
            grids[dequantise.output[0]] = grid


def _grid(node: NodeProto, constants: dict[str, np.ndarray]) -> tuple[float, int]:
    return float(constants[node.input[1]]), int(constants[node.input[2]])


def _bypass(model: ModelProto, node: NodeProto, output: str) -> None:
    """Removes a node, and lets who reads `output` read the node's input."""
    for reader in _readers(model, output):
        for position, name in enumerate(reader.input):
            if name == output:
                reader.input[position] = node.input[0]
    model.graph.node.remove(node)


def _read_rounded(model: ModelProto, pool: NodeProto, quantise: NodeProto, dequantise: NodeProto) -> None:
    """Lets all who read a pooling read it rounded, which is the same, so that it need not be there as a float."""
    graph = model.graph
    for node in (dequantise, quantise):
        graph.node.remove(node)
    for reader in _readers(model, pool.output[0]):
        for position, name in enumerate(reader.input):
            if name == pool.output[0]:
                reader.input[position] = dequantise.output[0]
    place = list(graph.node).index(pool) + 1
    graph.node.insert(place, dequantise)
    graph.node.insert(place, quantise)


def _resolve_identities(model: ModelProto) -> None:
    """Lets the readers of an Identity read its input: the exporter makes one for each constant that it shares."""
    graph = model.graph
    outputs = {output.name for output in graph.output}
    aliases = {node.output[0]: node for node in graph.node if node.op_type == "Identity"}
    aliases = {name: node for name, node in aliases.items() if name not in outputs}
    for node in graph.node:
        for position, name in enumerate(node.input):
            while name in aliases:
                name = aliases[name].input[0]
            node.input[position] = name
    for node in aliases.values():
        graph.node.remove(node)


def _store_weight(model: ModelProto, quantise: NodeProto, constants: dict[str, np.ndarray]) -> None:
    """Quantises a constant now instead of at every start, and transposes it now where the graph does so."""
    graph = model.graph
    weight, scale_C = constants[quantise.input[0]], constants[quantise.input[1]]
    levels = np.rint(weight / scale_C.reshape(-1, *[1] * (weight.ndim - 1))).clip(-128, 127).astype(np.int8)
    name = f"{quantise.output[0]}_int8"
    dequantise = _readers(model, quantise.output[0])[0]
    readers = _readers(model, dequantise.output[0])
    transpose = readers[0] if len(readers) == 1 and readers[0].op_type == "Transpose" else None
    if transpose is not None and weight.ndim == 2:
        levels = np.ascontiguousarray(levels.T)
        next(attribute for attribute in dequantise.attribute if attribute.name == "axis").i = 1
        dequantise.output[0] = transpose.output[0]
        graph.node.remove(transpose)
    graph.initializer.append(numpy_helper.from_array(levels, name))
    dequantise.input[0] = name
    graph.node.remove(quantise)


def _store_bias(
    model: ModelProto, node: NodeProto, constants: dict[str, np.ndarray], made_by: dict[str, NodeProto]
) -> None:
    """Stores a bias as int32 with the scale of the products that it is added to, which integer kernels require."""
    graph = model.graph
    inside, weight = made_by.get(node.input[0]), made_by.get(node.input[1])
    if inside is None or weight is None or {inside.op_type, weight.op_type} != {"DequantizeLinear"}:
        return
    if not constants[node.input[2]].any():
        del node.input[2]
        return
    scale_C = constants[inside.input[1]] * constants[weight.input[1]]
    levels = np.rint(constants[node.input[2]].astype(np.float64) / scale_C).astype(np.int32)
    name = f"{node.name}/bias"  # after its reader: equal constants share a name, and their scales differ
    graph.initializer.append(numpy_helper.from_array(levels, f"{name}_int32"))
    graph.initializer.append(numpy_helper.from_array(scale_C, f"{name}_scale"))
    dequantised = f"{name}_dequantised"
    made = helper.make_node("DequantizeLinear", [f"{name}_int32", f"{name}_scale"], [dequantised], name, axis=0)
    graph.node.insert(list(graph.node).index(node), made)
    node.input[2] = dequantised


def _readers(model: ModelProto, name: str) -> list[NodeProto]:
    return [node for node in model.graph.node if name in node.input]


def _drop_unused(model: ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input} | {out.name for out in model.graph.output}
    for tensor in list(model.graph.initializer):
        if tensor.name not in used:
            model.graph.initializer.remove(tensor)


def _shorten_names(model: ModelProto) -> None:
    """Numbers the values of the graph: their paths would take a tenth of a small int8 file."""
    graph = model.graph
    short = {value.name: value.name for value in (*graph.input, *graph.output)}
    for tensor in graph.initializer:
        tensor.name = short.setdefault(tensor.name, str(len(short)))
    for node in graph.node:
        node.name, node.doc_string = "", ""
        for values in (node.input, node.output):
            for position, name in enumerate(values):
                values[position] = short.setdefault(name, str(len(short))) if name else ""
    del graph.value_info[:]
