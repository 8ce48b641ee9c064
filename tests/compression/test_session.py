import onnx
import pytest
import torch
from torch import nn

from trilemma.compression.export import export_onnx
from trilemma.compression.session import Session
from trilemma.errors import Failure
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9


@pytest.fixture(scope="module")
def model():
    return export_onnx(Resnet9(width=4).make(3, 16, 5, 0).eval(), 3, 16)


def test_any_number_of_images_and_any_batch_size_give_the_same_logits(model):
    session = Session(model)
    x = torch.rand(11, 3, 16, 16)
    once = session.predict(x)
    assert once.shape == (11, 5) and once.dtype == torch.float32
    for batch_size in (1, 4, 11):
        assert torch.allclose(session.predict(x, batch_size=batch_size), once, atol=1e-6)
    assert session.predict(x[:0]).shape == (0, 5)
    assert session.image_shape == (3, 16, 16) and session.num_classes == 5


def test_images_of_another_shape_are_refused(model):
    with pytest.raises(ValueError, match=r"takes images \(3, 16, 16\), not \(1, 16, 16\)"):
        Session(model).predict(torch.rand(2, 1, 16, 16))


def test_images_with_gradients_or_other_types_are_read(model):
    x = torch.rand(2, 3, 16, 16)
    session = Session(model)
    assert torch.equal(session.predict(x.clone().requires_grad_(True)), session.predict(x))
    assert torch.allclose(session.predict(x.double()), session.predict(x), atol=1e-6)


def test_latency_is_ordered_and_larger_for_more_images(model):
    session = Session(model)
    one, many = session.latency_seconds(1, 9), session.latency_seconds(64, 9)
    for latency in (one, many):
        assert 0 < latency.low <= latency.median <= latency.high
        assert latency.repeats == 9
    assert many.median > one.median


@pytest.mark.parametrize("damage", [b"", b"not a model", "truncated", "flipped"])
def test_a_broken_file_is_a_failure_with_a_message(model, damage, capfd):
    if damage == "truncated":
        damage = model[: len(model) // 2]
    elif damage == "flipped":
        damage = b"\xff" * 64 + model[64:]
    with pytest.raises(Failure, match="model file: it cannot be loaded"):
        Session(damage)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_a_foreign_model_is_a_failure(model):
    foreign = onnx.load_from_string(model)
    foreign.graph.output[0].name = "scores"
    for node in foreign.graph.node:
        for position, name in enumerate(node.output):
            if name == "logits":
                node.output[position] = "scores"
    with pytest.raises(Failure, match=r"returns \['scores'\]"):
        Session(foreign.SerializeToString())


def test_a_model_that_fixed_its_batch_size_is_a_failure():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, -1)[:, :5]  # traced with two images

    session = Session(export_onnx(Classifier(Fixed(), 5), 1, 8))
    with pytest.raises(Failure, match="2 answers to 4 images"):
        session.predict(torch.rand(4, 1, 8, 8))
