import copy

import pytest
import torch
from torch import nn

from trilemma.compression.calibration import observe
from trilemma.compression.fake_quantisation import QuantReLU, quantise
from trilemma.compression.rounding_flow import rounding_flow
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9, Resnet18
from trilemma.randomness import global_seed


def images(num=8, size=16):
    return torch.rand(num, 1, size, size, generator=torch.Generator().manual_seed(0))


def flow_of(classifier):
    """The flow by names."""
    names = {module: name.removeprefix("module.") for name, module in classifier.named_modules()}
    layers = [module for module in names if type(module) in (nn.Conv2d, nn.Linear)]
    flow = rounding_flow(classifier, layers, images())
    sources = {names[layer]: names[source] for layer, source in flow.sources.items()}
    return {names[layer] for layer in flow.rectified}, {names[relu] for relu in flow.sums}, sources


class Block(nn.Module):
    """A convolution, what `between` makes of it, and another one."""

    def __init__(self, between, inplace=False):
        super().__init__()
        with global_seed(0, "block"):
            self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.between = nn.ReLU(inplace), between

    def forward(self, x):
        return self.between(self, x).mean((2, 3))


def added_in_place(block, x):
    out = block.first(x)
    out += x  # the same object as the convolution's output, and other numbers
    return block.second(block.relu(out))


CASES = {
    "plain": (lambda block, x: block.second(block.relu(block.first(x))), {"first"}, set(), {"second": "first"}),
    "no relu": (lambda block, x: block.second(block.first(x)), set(), set(), {"second": "first"}),
    "also read without": (
        lambda block, x: block.second(block.relu(h := block.first(x))) + h,
        set(),
        set(),
        {"second": "first"},
    ),
    "sum": (lambda block, x: block.second(block.relu(block.first(x) + x)), set(), {"relu"}, {"second": "relu"}),
    "sum in place": (added_in_place, set(), {"relu"}, {"second": "relu"}),
    "sum for nobody": (
        lambda block, x: block.relu(block.second(block.first(x)) + x),
        set(),
        set(),
        {"second": "first"},
    ),
    "unseen": (lambda block, x: block.second(block.first(x).sin()), set(), set(), {}),
    "two relus of one": (
        lambda block, x: block.second(block.relu(block.relu(block.first(x) + x))),
        set(),
        set(),
        {},
    ),
    "two sources": (
        lambda block, x: block.second(block.relu(block.first(x))) + block.second(x.expand(-1, 4, -1, -1)),
        {"first"},
        set(),
        {},
    ),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_flow_through_a_block(case, inplace):
    between, *expected = CASES[case]
    if inplace and case == "also read without":
        expected[0] = {"first"}  # then both read what the ReLU left
    assert list(flow_of(Classifier(Block(between, inplace), 4).eval())) == expected


def test_poolings_and_folded_norms_pass_numbers_on():
    with global_seed(0, "passing"):
        layers = [nn.Conv2d(1, 4, 3), nn.Identity(), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten()]
        network = nn.Sequential(*layers, nn.Linear(196, 2), nn.Tanh(), nn.Linear(2, 2))
    assert flow_of(Classifier(network, 2).eval()) == ({"0"}, set(), {"6": "0"})
    network[3] = nn.AvgPool2d(2)  # makes new numbers
    assert flow_of(Classifier(network, 2).eval()) == ({"0"}, set(), {})


def test_the_residual_networks_of_a_study():
    rectified, sums, sources = flow_of(Resnet9(width=4, norm="none").make(1, 16, 2, 0).eval())
    assert rectified == {f"{name}.conv" for name in ("conv1", "conv2", "res1.0", "res1.1")} | {
        f"{name}.conv" for name in ("conv3", "conv4", "res2.0", "res2.1")
    }
    assert not sums
    assert "conv3.conv" not in sources and sources["conv2.conv"] == "conv1.conv"  # conv3 reads a sum
    rectified, sums, sources = flow_of(Resnet18(width=4, norm="none").make(1, 16, 2, 0).eval())
    assert rectified == {"stem.0"} | {f"stage{stage}.{block}.conv1" for stage in (1, 2, 3, 4) for block in (0, 1)}
    assert len(sums) == 7  # the last one is averaged
    assert sources["stage2.0.conv1"] == sources["stage2.0.shortcut.0"] == "stage1.1.activation2"


def test_what_a_norm_makes_of_numbers_is_no_sum():
    assert flow_of(Resnet9(width=4, norm="group").make(1, 16, 2, 0).eval()) == (set(), set(), {})


def test_the_flow_leaves_the_network_alone():
    classifier = Resnet18(width=4, norm="batch").make(1, 16, 2, 0).eval()
    before = copy.deepcopy(classifier.state_dict())
    flow_of(classifier)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in classifier.modules())


@pytest.mark.parametrize("rule", ["min_max", "percentile", "mse"])
def test_levels_of_a_rectified_layer_start_at_zero_and_are_read_as_they_are(rule):
    classifier = Resnet18(width=4, norm="weight").make(1, 16, 2, 0).eval()
    twin = quantise(classifier, images(32), rule).module
    assert int(twin.stem[0].output_grid.zero_point) == 0
    assert int(twin.stage1[0].conv2.output_grid.zero_point) > 0  # its negative numbers enter a sum
    assert isinstance(twin.stage1[0].activation2, QuantReLU)
    assert type(twin.stage4[1].activation2) is nn.ReLU
    read = {"scale": twin.stage2[0].shortcut[0].input_grid.scale, "made": twin.stage1[1].activation2.output_grid.scale}
    assert read["scale"] == read["made"]
    assert twin.stage1[0].conv1.input_grid.scale == twin.stem[0].output_grid.scale


def test_of_a_rectified_layer_only_what_is_positive_is_observed():
    with global_seed(0, "observed"):
        network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 2))
    classifier, conv = Classifier(network, 2).eval(), network[0]
    (all_of_it,) = observe(classifier, [conv], images()).values()
    (positive,) = observe(classifier, [conv], images(), rectified={conv}).values()
    assert all_of_it.outside.low < 0 == positive.outside.low
    assert positive.outside.high == all_of_it.outside.high
    assert positive.inside == all_of_it.inside
