"""Images made from a model alone."""

import os
from types import SimpleNamespace

import pytest
import torch

from helpers.small_problem import stripes, trained
from trilemma.compression import synthetic
from trilemma.compression.step import Looks
from trilemma.compression.synthetic import synthetic_images
from trilemma.models.specs import Resnet9
from trilemma.randomness import generator
from trilemma.study.compress_job import material
from trilemma.study.workplace import Workplace

NUM = 70  # more than a batch


@pytest.fixture(scope="module", params=["group", "batch"])
def net(request):
    return trained(Resnet9(width=4, norm=request.param).make(1, 16, 3, 0), stripes(96, size=16), steps=12)


def confidence(net, x):
    with torch.no_grad():
        return net(x).softmax(1)[torch.arange(len(x)), torch.arange(len(x)) % 3]


def test_the_model_becomes_sure_of_its_classes_in_turn(net, monkeypatch):
    made = synthetic_images(net, NUM, (1, 16, 16), generator(0, "made"))
    assert made.shape == (NUM, 1, 16, 16) and made.dtype == torch.float32
    assert float(made.min()) >= 0 and float(made.max()) <= 1
    monkeypatch.setattr(synthetic, "_STEPS", 0)
    start = synthetic_images(net, NUM, (1, 16, 16), generator(0, "made"))
    monkeypatch.setattr(synthetic, "_STEPS", 5)
    early = synthetic_images(net, NUM, (1, 16, 16), generator(0, "made"))
    sure = [float(confidence(net, x).mean()) for x in (start, early, made)]
    assert sure[0] < sure[1] < sure[2] and sure[0] < 0.5
    assert (confidence(net, made) > confidence(net, start)).float().mean() > 0.9
    assert start.flatten(1).std(0).min() > 0, "no two begin alike"


def test_the_same_draws_give_the_same_images_and_others_give_others(net):
    first, again, other = (synthetic_images(net, 8, (1, 16, 16), generator(seed, "made")) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_shapes_are_those_that_are_asked_for():
    net = Resnet9(width=4).make(3, 12, 2, 0).eval()
    assert synthetic_images(net, 3, (3, 12, 12), generator(0, "made")).shape == (3, 3, 12, 12)


def test_the_model_is_left_as_it_was(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    synthetic_images(net, 4, (1, 16, 16), generator(0, "made"))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_no_image_is_read(net, tmp_path):
    """The job gets a data set that has a form and no records at all."""
    place = Workplace(tmp_path, SimpleNamespace(), "cpu", 1, os.getpid())
    form = SimpleNamespace(channels=1, image_size=16)
    images = material(place, net, form, 0).images
    assert torch.equal(images(Looks("synthetic", 4)), images(Looks("synthetic", 4)))
    assert not torch.equal(images(Looks("synthetic", 4)), material(place, net, form, 1).images(Looks("synthetic", 4)))
    for source in ("train", "val", "public"):
        with pytest.raises(AttributeError):
            images(Looks(source, 4))
