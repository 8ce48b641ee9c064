"""How numbers are written: each kind keeps what it says, and what is no number stays none."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilemma.federation.codecs.numbers import BLOCK, LEVELS, Numbers, num_bytes, read_numbers, write_numbers
from trilemma.federation.codecs.positions import read_positions, write_positions

KINDS = get_args(Numbers)
every_kind = pytest.mark.parametrize("kind", KINDS)
lengths = st.sampled_from([0, 1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])


def values(count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, generator=draws) * torch.rand(count, generator=draws).exp()


def there_and_back(values_K: torch.Tensor, kind, seed: int = 0) -> torch.Tensor:
    payload = write_numbers(values_K, kind, torch.Generator().manual_seed(seed))
    assert len(payload) == num_bytes(kind, len(values_K))
    return read_numbers(payload, kind, len(values_K))


def in_blocks(values_K: torch.Tensor) -> list[torch.Tensor]:
    return list(values_K.split(BLOCK))


@every_kind
@given(count=lengths, seed=st.integers(0, 99), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e3]))
def test_the_error_is_as_stated(kind, count, seed, scale):
    sent_K = values(count, seed, scale)
    got_K = there_and_back(sent_K, kind, seed)
    assert got_K.shape == sent_K.shape and got_K.dtype == torch.float32
    for sent, got in zip(in_blocks(sent_K), in_blocks(got_K), strict=True):
        if not len(sent):
            continue
        error = (sent - got).abs()
        if kind == "float32":
            assert torch.equal(sent, got)
        elif kind == "float16":
            assert (error <= sent.abs() * 2**-11 + 2**-25).all()
        elif kind == "sign":
            assert torch.allclose(got, sent.abs().mean() * torch.where(sent >= 0, 1.0, -1.0), rtol=1e-5)
            length = float(sent.double().square().sum())
            left = length - float(sent.double().abs().sum()) ** 2 / len(sent)
            found = float((sent.double() - got.double()).square().sum())
            assert found == pytest.approx(left, rel=0, abs=1e-6 * length)
        else:
            assert (error <= sent.abs().max() / LEVELS[kind] * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_levels_are_right_on_average(kind):
    sent_K = values(40, 3)
    mean_K = torch.stack([there_and_back(sent_K, kind, seed) for seed in range(4000)]).mean(0)
    step = float(sent_K.abs().max()) / LEVELS[kind]
    assert ((mean_K - sent_K).abs() < 5 * step / 2 / 4000**0.5).all()


@every_kind
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_does_not_come_back_as_one(kind, odd):
    sent_K = values(2 * BLOCK + 3, 0)
    sent_K[BLOCK + 2] = odd
    got_K = there_and_back(sent_K, kind)
    assert not got_K.isfinite().all()
    assert got_K[:BLOCK].isfinite().all()


def test_a_number_too_large_for_float16_is_its_largest():
    got_K = there_and_back(torch.tensor([1e6, -1e6, 65504.0]), "float16")
    assert got_K.tolist() == [65504.0, -65504.0, 65504.0]


@every_kind
@given(count=st.integers(0, 3000), wrong=st.integers(-5, 5))
def test_another_number_of_bytes_is_refused(kind, count, wrong):
    payload = bytes(max(0, num_bytes(kind, count) + wrong))
    if len(payload) == num_bytes(kind, count):
        assert not read_numbers(payload, kind, count).any()
    else:
        with pytest.raises(ValueError, match="bytes and not"):
            read_numbers(payload, kind, count)


@given(st.sets(st.integers(0, 5000), max_size=200))
def test_positions_come_back(chosen):
    positions_K = np.array(sorted(chosen), dtype=np.int64)
    payload = write_positions(positions_K)
    assert np.array_equal(read_positions(payload, len(chosen), 5001), positions_K)
    assert len(payload) <= len(chosen) + 5001 // 255 + 1


@given(st.binary(max_size=60), st.integers(0, 60), st.integers(0, 4000))
def test_bytes_that_are_no_positions_are_refused(junk, count, below):
    try:
        positions_K = read_positions(junk, count, below)
    except ValueError:
        return
    assert len(positions_K) == count and (np.diff(positions_K) > 0).all()
    assert all(0 <= position < below for position in positions_K)
