"""Bits by sensitivity: within the budget, with as little harm as it buys, and refused where it buys nothing."""

import itertools
import re

import pytest
import torch
from torch import nn

from trilemma.compression.mixed_precision import CHOICES, bits_by_sensitivity
from trilemma.compression.step import weight_names
from trilemma.compression.stored_weights import store, store_weights
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9
from trilemma.randomness import global_seed

GROUP = 16


@pytest.fixture(scope="module")
def net():
    return Resnet9(width=4).make(1, 16, 2, 0).eval()


@pytest.fixture(scope="module")
def x():
    return torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def bytes_of(net, bits):
    return {
        (name, each): store(net.get_parameter(name), each, GROUP if each == 4 else None).num_bytes
        for name in weight_names(net)
        for each in bits
    }


def harm(net, bits_of, x):
    """The mean squared change of the logits, computed the slow way: on a network that stores these weights."""
    with torch.no_grad():
        return float((store_weights(net, bits_of, GROUP)(x) - net(x)).double().square().mean())


def spent(net, chosen):
    return sum(bytes_of(net, CHOICES)[pair] for pair in chosen.items())


def test_more_budget_is_never_exceeded_and_never_does_more_harm(net, x):
    names = weight_names(net)
    least, most = (sum(bytes_of(net, [bits]).values()) for bits in (4, 16))
    alone = {(name, bits): harm(net, {name: bits}, x) for name in names for bits in CHOICES}
    before, first, last = float("inf"), None, None
    for budget in [*range(least, most, (most - least) // 12), most, 10 * most]:
        chosen = bits_by_sensitivity(net, names, x, budget, GROUP)
        assert list(chosen) == names and set(chosen.values()) <= set(CHOICES)
        assert spent(net, chosen) <= budget
        now = sum(alone[pair] for pair in chosen.items())
        assert now <= before
        # What is left of the budget buys nothing: no single layer could be better off.
        left = budget - spent(net, chosen)
        for name, bits in itertools.product(names, CHOICES):
            more = bytes_of(net, CHOICES)[name, bits] - bytes_of(net, CHOICES)[name, chosen[name]]
            assert more <= 0 or more > left or alone[name, bits] >= alone[name, chosen[name]]
        before, first, last = now, first or chosen, chosen
    assert set(first.values()) == {4} and set(last.values()) <= {8, 16}  # of some weights 8 bits are as good
    assert harm(net, last, x) < 0.01 * harm(net, first, x), "together too, and not only one by one"


def test_the_first_upgrade_is_what_a_byte_buys_most_of():
    with global_seed(0, "two layers"):
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    net = Classifier(module, 2).eval()
    x, names = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), weight_names(net)
    size, least = bytes_of(net, CHOICES), sum(bytes_of(net, [4]).values())
    alone = {(name, bits): harm(net, {name: bits}, x) for name in names for bits in CHOICES}
    gains = {
        (name, bits): (alone[name, 4] - alone[name, bits]) / (size[name, bits] - size[name, 4])
        for name in names
        for bits in (8, 16)
    }
    name, bits = max(gains, key=gains.__getitem__)
    assert alone["module.1.weight", 4] > alone["module.3.weight", 4] and name == "module.3.weight"
    chosen = bits_by_sensitivity(net, names, x, least + size[name, bits] - size[name, 4], GROUP)
    assert chosen == dict.fromkeys(names, 4) | {name: bits}
    # The other does more harm, and would fit: but no longer beside what a byte buys more of.
    enough = least + size["module.1.weight", 8] - size["module.1.weight", 4]
    assert bits_by_sensitivity(net, names, x, enough, GROUP)["module.1.weight"] == 4


def test_a_layer_that_matters_gets_its_bits_first():
    with global_seed(0, "two layers"):
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2))
    net = Classifier(module, 2).eval()
    with torch.no_grad():  # 7 levels of 1/64: 4 bits hold the second layer exactly
        net.module[3].weight.copy_(net.module[3].weight.sign() * 7 / 64)
    names = weight_names(net)
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    least = sum(bytes_of(net, [4]).values())
    chosen = bits_by_sensitivity(net, names, x, least + 10_000, GROUP)
    assert chosen == {"module.1.weight": 16, "module.3.weight": 4}


def test_nothing_of_the_network_changes(net, x):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    bits_by_sensitivity(net, weight_names(net), x, 10**6, GROUP)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_budget_that_cannot_be_kept_is_refused_with_both_numbers(net, x):
    names = weight_names(net)
    least = sum(bytes_of(net, [4]).values())
    with pytest.raises(ValueError, match=f"take {least} bytes, and the budget is {least - 1}"):
        bits_by_sensitivity(net, names, x, least - 1, GROUP)
    assert set(bits_by_sensitivity(net, names, x, least, GROUP).values()) == {4}


def test_the_fewest_bits_are_not_always_the_fewest_bytes():
    """33 weights in groups of 32 take two groups; as 8 bits they are shorter, and the budget holds for these."""
    net = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(33, 2)), 2).eval()
    x, names = torch.rand(4, 1, 3, 11), ["module.1.weight"]
    four, eight = (store(net.module[1].weight, bits, group).num_bytes for bits, group in ((4, 32), (8, None)))
    assert eight < four
    assert bits_by_sensitivity(net, names, x, eight, 32) == {"module.1.weight": 8}
    with pytest.raises(ValueError, match=re.escape(f"take {eight} bytes, and the budget is {eight - 1}")):
        bits_by_sensitivity(net, names, x, eight - 1, 32)


def test_without_an_image_nothing_is_known(net, x):
    with pytest.raises(ValueError, match="at least one image"):
        bits_by_sensitivity(net, weight_names(net), x[:0], 10**6, GROUP)
