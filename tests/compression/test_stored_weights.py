"""Weights in few bits: a loop over every group, and what comes back of what is stored."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from trilemma.compression.stored_weights import (
    LEVELS,
    Stored,
    StoredWeights,
    empty_places,
    store,
    store_weights,
    stored_weights,
)
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9

LARGEST = np.float32(np.finfo(np.float16).max)


def naive(weight, bits, group_size):
    """Weights one group after the other: the smallest float16 scale whose last level reaches the largest weight."""
    flat = np.nan_to_num(weight.numpy().reshape(len(weight), -1).astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    found, most = np.zeros_like(flat), np.float32(LEVELS[bits])
    size = group_size or flat.shape[1]
    for row in range(len(flat)):
        for start in range(0, flat.shape[1], size):
            group = flat[row, start : start + size]
            largest = np.abs(group).max()
            scale = np.float16(min(largest / most, LARGEST))
            while np.float32(scale) * most < largest and scale < LARGEST:
                scale = np.nextafter(scale, np.float16(np.inf))
            if scale == 0:
                continue
            levels = np.clip(np.rint(group / np.float32(scale)), -most, most)
            found[row, start : start + size] = levels * np.float32(scale)
    return found.reshape(weight.shape)


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    group_size=st.sampled_from([None, 4, 5, 16, 64]),
    bits=st.sampled_from([4, 8]),
    magnitude=st.sampled_from([1e-9, 1e-8, 1e-6, 1e-3, 1.0, 1e3, 1e5, 1e6, 1e30]),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_every_group_is_rounded_as_a_loop_does_it(rows, columns, group_size, bits, magnitude, zeros, seed):
    draws = np.random.default_rng(seed)
    weight = magnitude * draws.normal(size=(rows, columns)).astype(np.float32)
    weight = torch.from_numpy(np.where(draws.random(weight.shape) < zeros, np.float32(0), weight).astype(np.float32))
    stored = store(weight, bits, group_size)
    rounded = stored.weight()
    np.testing.assert_array_equal(rounded.numpy(), naive(weight, bits, group_size))
    assert rounded.isfinite().all() and (rounded[weight == 0] == 0).all()
    assert stored.levels_OGg.abs().max() <= LEVELS[bits]
    assert stored.levels_OGg.dtype == torch.int8 and stored.scale_OG.dtype == torch.float16
    assert torch.equal(store(-weight, bits, group_size).weight(), -rounded)
    # No weight, not even the largest, is off by more than half a step, unless no float16 scale reaches it.
    worth = stored.scale_OG.float().repeat_interleave(stored.levels_OGg.shape[2], 1)[:, :columns]
    within = weight.abs() <= LEVELS[bits] * 65504.0
    assert ((weight - rounded).abs()[within] <= (0.5 + 1e-5) * worth[within]).all()


@settings(deadline=None, max_examples=30)
@given(shape=st.sampled_from([(3, 7), (4, 2, 3, 3), (1, 1), (2, 33)]), group_size=st.sampled_from([None, 4, 32]))
def test_the_bytes_are_those_of_levels_and_scales(shape, group_size):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    per_channel = weight[0].numel()
    size = min(group_size or per_channel, per_channel)
    groups = shape[0] * -(-per_channel // size)
    assert store(weight, 4, group_size).num_bytes == -(-groups * size // 2) + 2 * groups
    assert store(weight, 8, group_size).num_bytes == groups * size + 2 * groups
    assert store(weight, 16).num_bytes == 2 * weight.numel()


def test_the_ends_of_float16():
    tiny, huge = torch.tensor([[1e-8, -1e-8]]), torch.tensor([[1e6, -3e5, 1e5]])
    assert torch.equal(store(tiny, 4).weight(), torch.zeros(1, 2))
    assert store(tiny, 4).scale_OG.item() == 2**-24  # the smallest above zero
    assert torch.equal(store(huge, 4).weight(), torch.tensor([[7 * 65504.0, -5 * 65504.0, 2 * 65504.0]]))
    assert store(huge, 8).weight()[0, 0] == pytest.approx(1e6, rel=1e-3)
    assert torch.equal(store(tiny, 16).weight(), tiny.bfloat16().float())


def test_bfloat16_is_torchs_and_never_infinite():
    weight = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(store(weight, 16).weight(), weight.bfloat16().float())
    ends = torch.tensor([[torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, torch.inf, torch.nan]])
    largest = torch.finfo(torch.bfloat16).max
    assert torch.equal(store(ends, 16).weight(), torch.tensor([[largest, -largest, 0.0, 0.0]]))


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_finite_becomes_zero_and_touches_no_other(bits):
    weight = torch.tensor([[1.0, torch.nan, -0.5, torch.inf], [torch.nan, -torch.inf, torch.nan, torch.inf]])
    zeros = weight.nan_to_num(0.0, 0.0, 0.0)
    assert torch.equal(store(weight, bits, 4).weight(), store(zeros, bits, 4).weight())
    assert (store(weight, bits, 4).weight()[1] == 0).all()


def test_what_is_stored_travels_in_the_state():
    g = torch.Generator().manual_seed(0)
    told = {
        "module.a.0.weight": store(torch.randn(3, 2, 3, 3, generator=g), 4, 16),
        "module.ä b.weight": store(torch.randn(5, 7, generator=g), 8),
        "w": store(torch.randn(2, 3, generator=g), 16),
    }
    places = StoredWeights(told)
    state = load(save({f"stored.{name}": value.contiguous() for name, value in places.state_dict().items()}))
    empty = empty_places({**state, "module.a.0.weight": torch.zeros(1), "restored.levels_9": torch.zeros(1)})
    assert empty.state_dict().keys() == places.state_dict().keys()
    empty.load_state_dict({name.removeprefix("stored."): value for name, value in state.items()})
    for read in (places.read(), empty.read()):
        assert list(read) == list(told)
        for name, one in read.items():
            assert isinstance(one, Stored) and (one.bits, one.shape) == (told[name].bits, told[name].shape)
            assert torch.equal(one.weight(), told[name].weight())
            assert one.num_bytes == told[name].num_bytes
    assert StoredWeights({}).read() == {} and empty_places({}).read() == {}


def test_only_the_named_weights_of_a_copy_change():
    classifier = Resnet9(width=4).make(1, 16, 2, 0).eval()
    before = copy.deepcopy(classifier.state_dict())
    name = next(name for name, value in classifier.state_dict().items() if value.ndim == 4)
    twin = store_weights(classifier, {name: 4}, 8)
    assert all(torch.equal(value, before[n]) for n, value in classifier.state_dict().items())
    assert stored_weights(classifier) == {} and list(stored_weights(twin)) == [name]
    changed = [n for n, value in before.items() if not torch.equal(value, twin.state_dict()[n])]
    assert changed == [name]
    assert torch.equal(twin.get_parameter(name), store(before[name], 4, 8).weight())


def test_a_weight_of_two_layers_is_rounded_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    classifier = Classifier(nn.Sequential(nn.Flatten(), first, nn.ReLU(), second), 4).eval()
    twin = store_weights(classifier, {"module.1.weight": 4, "module.3.weight": 4}, 4)
    assert torch.equal(twin.module[1].weight, store(first.weight, 4, 4).weight())
    assert twin.module[1].weight is twin.module[3].weight
