"""The file that ships takes decoded image files, and answers as the loader and the artefact do together."""

import json

import numpy as np
import onnx
import onnx.version_converter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

from trilemma.compression.export import export_onnx
from trilemma.compression.fake_quantisation import quantise
from trilemma.compression.session import Session, ShippedSession
from trilemma.compression.shipping import preprocessing_in_words, properties_of, ship_onnx
from trilemma.compression.trial import tried
from trilemma.data.images import read_image
from trilemma.errors import Failure
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Monai, Resnet9, Resnet18

SIZE = 8


class _Pixels(nn.Module):
    """Answers with its pixels, so that a test sees what the preprocessing makes of an image."""

    def forward(self, x_BCHW):
        return x_BCHW.flatten(1)


@pytest.fixture(scope="module")
def pixels():
    """Channels -> the shipped model whose logits are the resized image in levels, less 127.5, over 63.75."""
    models = {c: export_onnx(Classifier(_Pixels(), c * SIZE * SIZE), c, SIZE) for c in (1, 3)}
    return {channels: ShippedSession(ship_onnx(model, {})) for channels, model in models.items()}


def levels(session, images):
    logits, _ = session.answers(images)
    return np.rint((logits * 0.25 + 0.5) * 255).astype(int)


def by_pillow(image, resampling=Image.Resampling.BILINEAR):
    resized = np.asarray(Image.fromarray(image).resize((SIZE, SIZE), resampling))
    return (resized if resized.ndim == 2 else resized.transpose(2, 0, 1)).reshape(-1).astype(int)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), seed=st.integers(0, 99), colour=st.booleans())
def test_pixels_are_pillows_to_a_level(pixels, height, width, seed, colour):
    shape = (2, height, width, 3) if colour else (2, height, width)
    images = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    found = levels(pixels[3 if colour else 1], images)
    off = np.abs(found - np.stack([by_pillow(image) for image in images]))
    assert off.max() <= 1 and (off > 0).mean() < 0.3
    if (height, width) == (SIZE, SIZE):
        assert not off.any()


def test_without_antialiasing_pixels_would_not_be(pixels):
    """The control: the bound of a level tells Pillow's triangle filter from others."""
    image = np.random.default_rng(0).integers(0, 256, (50, 70), np.uint8)
    found = levels(pixels[1], image[None])[0]
    assert np.abs(found - by_pillow(image)).max() <= 1
    assert np.abs(found - by_pillow(image, Image.Resampling.NEAREST)).max() > 30
    assert np.abs(found - by_pillow(image, Image.Resampling.BICUBIC)).max() > 3
    plain = nn.functional.interpolate(torch.from_numpy(image)[None, None].float(), (SIZE, SIZE), mode="bilinear")
    assert np.abs(found - plain.numpy().reshape(-1)).max() > 30
    model = ship_onnx(export_onnx(Classifier(_Pixels(), SIZE * SIZE), 1, SIZE), {})
    assert np.array_equal(levels(ShippedSession(model), image[None])[0], found)
    beyond_the_edge = ShippedSession(altered(model, "exclude_outside"))
    assert np.abs(levels(beyond_the_edge, image[None])[0] - found).max() > 3


def made(channels, kind):
    spec = {
        "group": Resnet9(width=4),
        "batch": Resnet9(width=4, norm="batch"),
        "residual": Resnet18(width=4),
        "monai": Monai(
            network="ViT",
            arguments={"patch_size": 8, "hidden_size": 16, "mlp_dim": 16, "num_layers": 1, "num_heads": 2},
        ),
    }[kind]
    return spec.make(channels, 16, 3, 0).eval()


@pytest.mark.parametrize("quantised", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize(
    ("channels", "kind"), [(1, "group"), (3, "group"), (1, "batch"), (3, "residual"), (1, "monai")]
)
def test_images_of_the_own_size_are_answered_to_the_last_bit(channels, kind, quantised):
    net, draws = made(channels, kind), np.random.default_rng(1)
    if quantised:
        net = quantise(net, torch.from_numpy(draws.random((8, channels, 16, 16), np.float32)))
    artefact = export_onnx(net, channels, 16)
    images = draws.integers(0, 256, (5, 16, 16, channels), np.uint8)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float().div(255)
    session = ShippedSession(ship_onnx(artefact, {}))
    logits, probabilities = session.answers(images[..., 0] if channels == 1 else images)
    expected = Session(artefact).predict(x)
    assert np.array_equal(logits, expected.numpy())
    assert np.abs(probabilities - expected.softmax(1).numpy()).max() < 1e-6
    if not quantised:
        with torch.no_grad():
            assert torch.allclose(net(x), torch.from_numpy(logits), atol=1e-4)


def test_files_of_other_sizes_are_answered_like_the_loader_does(net, tmp_path):
    """The tolerance of a card's sentence, on files: two thousandths of a probability for float models."""
    artefact = export_onnx(net, 1, 28)
    session, largest = ShippedSession(ship_onnx(artefact, {})), 0.0
    draws = np.random.default_rng(0)
    for number, (height, width) in enumerate([(28, 28), (56, 56), (40, 61), (200, 150), (9, 31), (28, 60)]):
        image = draws.integers(0, 256, (height, width), np.uint8)
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        x = torch.tensor(read_image(tmp_path / f"{number}.png", 28, "grey")[None]).float().div(255)
        expected = Session(artefact).predict(x).softmax(1).numpy()
        largest = max(largest, float(np.abs(session.answers(image[None])[1] - expected).max()))
    assert largest < 2e-3, largest


def test_a_colour_model_takes_grey_files_and_no_others(pixels):
    grey = np.random.default_rng(2).integers(0, 256, (3, 20, 30, 1), np.uint8)
    assert np.array_equal(levels(pixels[3], grey), levels(pixels[3], grey.repeat(3, axis=3)))
    for channels in (2, 4):
        with pytest.raises(Failure, match="cannot be run"):
            pixels[3].answers(np.zeros((1, 9, 9, channels), np.uint8))


def test_it_says_what_it_is(net):
    artefact = export_onnx(net, 1, 28, {"trilemma.key": "s2:0", "trilemma.guarantee": "{}"})
    shipped = ship_onnx(artefact, {"trilemma.classes": json.dumps(["a", "b", "ç"])})
    assert properties_of(shipped) == {
        "trilemma.key": "s2:0", "trilemma.guarantee": "{}", "trilemma.classes": '["a", "b", "\\u00e7"]',
    }  # fmt: skip
    assert shipped == ship_onnx(artefact, {"trilemma.classes": json.dumps(["a", "b", "ç"])})
    assert [value.name for value in onnx.load_from_string(shipped).graph.output] == ["logits", "probabilities"]
    assert len(shipped) - len(artefact) < 2000
    assert "28 x 28" in " ".join(preprocessing_in_words(1, 28)) and "three equal" in preprocessing_in_words(3, 28)[2]


def damaged(artefact, how):
    model = onnx.load_from_string(artefact)
    if how == "external":
        tensor = next(a.t for node in model.graph.node for a in node.attribute if a.HasField("t"))
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../etc/passwd")
    elif how == "input":
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("picture", TensorProto.FLOAT, ["b", 1, 8, 8]))
    elif how == "oblong":
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, ["b", 1, 4, 16]))
    elif how == "huge":
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, ["b", 1, 9999, 9999]))
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no bytes", "does not lead|no ONNX|not sound"),
        ("noise", "no ONNX"),
        ("cut", "no ONNX|not sound|does not lead"),
        ("external", "another file"),
        ("input", "does not lead|not sound"),
        ("oblong", "not float32, square|not sound"),
        ("huge", "not float32, square|not sound"),
        ("twice", "inside already"),
    ],
)
def test_what_is_no_artefact_is_refused(how, said):
    artefact = export_onnx(Classifier(_Pixels(), SIZE * SIZE), 1, SIZE)
    content = {
        "no bytes": b"", "noise": b"\xff" * 400, "cut": artefact[: len(artefact) // 2],
    }.get(how) if how in ("no bytes", "noise", "cut") else (
        ship_onnx(artefact, {}) if how == "twice" else damaged(artefact, how)
    )  # fmt: skip
    with pytest.raises(Failure, match=said):
        ship_onnx(content, {})


def altered(shipped, how):
    """A shipped file with one thing wrong with its preprocessing."""
    model = onnx.load_from_string(shipped)
    if how == "scale":
        tensor = next(t for t in model.graph.initializer if t.name == "preprocessing/levels")
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(256, np.float32), tensor.name))
    elif how == "probabilities":
        model.graph.node[-1].op_type = "Sigmoid"
        del model.graph.node[-1].attribute[:]
    else:
        resize = next(node for node in model.graph.node if node.op_type == "Resize")
        next(a for a in resize.attribute if a.name == how).i = 0
    return model.SerializeToString()


def test_a_trial_tells_a_wrong_file_from_a_right_one(net):
    artefact = export_onnx(net, 1, 28)
    shipped = ship_onnx(artefact, {})
    right = tried(artefact, shipped)
    assert right.own_size == 0 and 0 < right.largest < 2e-3 and right.num_images == 12
    for how in ("scale", "probabilities"):
        with pytest.raises(Failure, match="grey image otherwise"):
            tried(artefact, altered(shipped, how))


def test_a_model_without_finite_answers_does_not_ship():
    net = Resnet9(width=4).make(1, 16, 2, 0).eval()
    with torch.no_grad():
        next(iter(net.parameters())).fill_(float("nan"))
    artefact = export_onnx(net, 1, 16)
    with pytest.raises(Failure, match="not finite"):
        tried(artefact, ship_onnx(artefact, {}))


@pytest.mark.parametrize("opset", [18, 21])
def test_a_model_of_a_later_operator_set_keeps_it(opset):
    net = Resnet9(width=4).make(1, 16, 2, 0).eval()
    model = onnx.version_converter.convert_version(onnx.load_from_string(export_onnx(net, 1, 16)), opset)
    shipped = ship_onnx(model.SerializeToString(), {})
    assert [each.version for each in onnx.load_from_string(shipped).opset_import] == [opset]
    assert tried(model.SerializeToString(), shipped).own_size == 0
