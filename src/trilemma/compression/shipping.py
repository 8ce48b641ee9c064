"""An artefact's ONNX file with its preprocessing inside, so that it can be run where nothing of this program is.

The graph takes what an image file decodes to, uint8 of any size, and does what the loader of image files does: it
resizes with antialiasing and rounds to 8 bits, as Pillow does (ONNX Resize, linear, antialias, what lies outside left
out; operator set 18), makes three channels of one where the model has three, and divides by 255. Behind that stands
the artefact's own graph, unchanged. "probabilities" is the softmax of "logits".
"""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

from trilemma.errors import Failure

#: The first operator set in which Resize has antialiasing; models of a later one keep theirs.
OPSET = 18

#: Limits on what a file may say of its images; those of `trilemma.data.specs` lie within.
_MAX_SIZE = 4096
_CHANNELS = (1, 3)

#: The names of the added values begin with this; those of an artefact are numbers.
_OWN = "preprocessing/"

_REMEDY = "Put the file back from a copy, or run the study again in another store"


def ship_onnx(onnx_bytes: bytes, properties: Mapping[str, str]) -> bytes:
    """Returns a model that takes decoded image files; equal arguments give equal bytes.

    Args:
        onnx_bytes: What `export_onnx` returned: "image" float32 (B, C, S, S) in [0, 1] to "logits" (B, K).
        properties: What the file shall say of itself beside what it says already.

    Returns:
        A graph from "image" uint8, (N, H, W) for a model of grey images and (N, H, W, 1 or 3) for one of colour
        images, with N, H and W free, to "logits" and "probabilities", both (N, K) float32.

    Raises:
        Failure: If the bytes are no such model.
    """
    model = _read(onnx_bytes)
    channels, size = _image_of(model)
    told = {entry.key: entry.value for entry in model.metadata_props}
    if max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=0) < OPSET:
        model = version_converter.convert_version(model, OPSET)
    _prepend(model, channels, size)
    _append_softmax(model)
    helper.set_model_props(model, dict(sorted({**told, **properties}.items())))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def properties_of(onnx_bytes: bytes) -> dict[str, str]:
    """Returns what a model file says of itself.

    Raises:
        Failure: If the bytes are no model.
    """
    return {entry.key: entry.value for entry in _parsed(onnx_bytes).metadata_props}


def preprocessing_in_words(channels: int, size: int) -> tuple[str, ...]:
    """Returns what `ship_onnx` puts before a model, a sentence each.

    Args:
        channels: Of the model's images, 1 or 3.
        size: Their height and width, in pixels.
    """
    takes = "(N, H, W), grey" if channels == 1 else "(N, H, W, C), C = 3 for red, green, blue or 1 for grey"
    colour = [] if channels == 1 else ["One channel becomes three equal ones."]
    return (
        f"Input “image”: uint8, shape {takes}; N, H and W are free, all images of a call have one size.",
        f"It is resized to {size} x {size} pixels by the triangle filter with antialiasing and rounded to 8 bits, "
        "whatever its proportions were: nothing is cropped or padded.",
        *colour,
        "It is divided by 255. What the model subtracts and divides by after that is part of its own graph.",
    )


def _parsed(onnx_bytes: bytes) -> ModelProto:
    try:
        return onnx.load_from_string(onnx_bytes)
    except Exception as error:  # protobuf's own exceptions, of which the Python and the C parsers have different ones
        raise _not_ours("it is no ONNX file") from error


def _read(onnx_bytes: bytes) -> ModelProto:
    model = _parsed(onnx_bytes)
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in _tensors(model.graph)):
        raise _not_ours("its weights lie in another file")
    names = {name for node in model.graph.node for name in (*node.input, *node.output)}
    if any(name.startswith(_OWN) for name in names) or "probabilities" in names:
        raise _not_ours("it has its preprocessing inside already")
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker and shape inference raise unrelated classes
        raise _not_ours("its graph is not sound") from error
    return model


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Yields every constant of a graph and of those within it."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def _image_of(model: ModelProto) -> tuple[int, int]:
    """Returns C and S of a model's images."""
    graph = model.graph
    if [value.name for value in graph.input] != ["image"] or [value.name for value in graph.output] != ["logits"]:
        raise _not_ours("it does not lead from “image” to “logits”")
    shape = [dimension.dim_value for dimension in graph.input[0].type.tensor_type.shape.dim]
    fits = len(shape) == 4 and shape[1] in _CHANNELS and shape[2] == shape[3] and 1 <= shape[2] <= _MAX_SIZE
    if not fits or graph.input[0].type.tensor_type.elem_type != TensorProto.FLOAT:
        raise _not_ours("its images are not float32, square and of 1 or 3 channels")
    return shape[1], shape[2]


def _not_ours(problem: str) -> Failure:
    return Failure("model file", problem, _REMEDY)


def _prepend(model: ModelProto, channels: int, size: int) -> None:
    """Puts the preprocessing before a graph, in place."""
    graph, unit = model.graph, f"{_OWN}unit"
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name == "image":
                node.input[position] = unit
    shape = ["N", "H", "W"] if channels == 1 else ["N", "H", "W", "C"]
    graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.UINT8, shape))
    constants = {"square": np.array([size, size], np.int64), "levels": np.array(255, np.float32)}
    if channels == 1:
        constants["axis"] = np.array([1], np.int64)
        first = helper.make_node("Unsqueeze", ["image", f"{_OWN}axis"], [f"{_OWN}planes"])
    else:
        constants["three"] = np.array([1, 3, 1, 1], np.int64)
        first = helper.make_node("Transpose", ["image"], [f"{_OWN}planes"], perm=[0, 3, 1, 2])
    added = [first, *_resized(), *_scaled(channels, unit)]
    for position, node in enumerate(added):
        graph.node.insert(position, node)
    del graph.value_info[:]
    # Without it ONNX Runtime does not know the size behind the Resize, fuses less, and rounds otherwise.
    graph.value_info.append(helper.make_tensor_value_info(unit, TensorProto.FLOAT, ["batch", channels, size, size]))
    graph.initializer.extend(numpy_helper.from_array(value, f"{_OWN}{name}") for name, value in constants.items())


def _resized() -> list[NodeProto]:
    # All four sizes are given, for ONNX Runtime 1.31 loses the sizes of a Resize with `axes` behind a Transpose.
    return [
        helper.make_node("Shape", [f"{_OWN}planes"], [f"{_OWN}outer"], start=0, end=2),
        helper.make_node("Concat", [f"{_OWN}outer", f"{_OWN}square"], [f"{_OWN}sizes"], axis=0),
        helper.make_node(
            "Resize",
            [f"{_OWN}planes", "", "", f"{_OWN}sizes"],
            [f"{_OWN}resized"],
            mode="linear",
            antialias=1,
            exclude_outside=1,  # weights that fall beside the image count for nothing, as in Pillow
            coordinate_transformation_mode="half_pixel",
        ),
    ]


def _scaled(channels: int, unit: str) -> list[NodeProto]:
    last = f"{_OWN}resized" if channels == 1 else f"{_OWN}coloured"
    expand = helper.make_node("Expand", [f"{_OWN}resized", f"{_OWN}three"], [last])
    return [
        *([] if channels == 1 else [expand]),
        helper.make_node("Cast", [last], [f"{_OWN}float"], to=TensorProto.FLOAT),
        helper.make_node("Div", [f"{_OWN}float", f"{_OWN}levels"], [unit]),
    ]


def _append_softmax(model: ModelProto) -> None:
    graph = model.graph
    graph.node.append(helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1))
    probabilities = graph.output.add()
    probabilities.CopyFrom(graph.output[0])
    probabilities.name = "probabilities"
