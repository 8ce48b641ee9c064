"""The sampler in whole numbers, on a repeatable stream of bytes in the place of the operating system's."""

import math
import tracemalloc
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from trilemma.privacy import rounded_gaussian as module
from trilemma.privacy.rounded_gaussian import CELLS, MAX_WIDTH, rounded_gaussian

LARGE = (1 << 34) + 12345


@pytest.fixture
def seeded_bytes(monkeypatch):
    """Makes the operating system's randomness repeatable."""
    monkeypatch.setattr("os.urandom", np.random.default_rng(0).bytes)


def chi_square_p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Chi-square of counts against probabilities, cells that expect fewer than 10 put together."""
    expected = counts.sum() * probabilities
    many = expected >= 10
    observed = np.append(counts[many], counts[~many].sum())
    expected = np.append(expected[many], expected[~many].sum())
    keep = expected > 0
    return float(stats.chi2.sf(((observed - expected)[keep] ** 2 / expected[keep]).sum(), keep.sum() - 1))


def cell_probabilities(edges: np.ndarray, sigma: float) -> np.ndarray:
    """Probability that a normal number lies between neighbouring edges."""
    return np.diff(stats.norm.cdf(edges / sigma))


@pytest.mark.parametrize(("width", "num"), [(1, 60_000), (3, 60_000), (32, 400_000)])
def test_every_whole_number_has_the_probability_of_its_rounding_cell(seeded_bytes, width, num):
    # At width 1 and 3 the exact comparison decides nearly alone; at 32 floating point does most of it.
    drawn = rounded_gaussian(num, width)
    far = 8 * CELLS * width
    edges = np.arange(-far, far + 1)
    counts = np.bincount(drawn + far, minlength=2 * far)
    sigma = CELLS * width
    assert chi_square_p_value(counts, cell_probabilities(edges, sigma)) > 0.01
    assert chi_square_p_value(counts, cell_probabilities(edges, sigma * 1.1)) < 1e-6


def test_negative_numbers_are_rounded_down_too(monkeypatch):
    # With the bit for the sign turned over, X becomes -X, and floor(-X) is -floor(X) - 1 for an X between two numbers.
    words = np.random.default_rng(2).integers(0, 1 << 64, (2, 1000), np.uint64)
    kept = []
    for sign in (0, 1):
        stream = np.stack([words[0], words[1] ^ np.uint64(sign)]).tobytes()
        monkeypatch.setattr("os.urandom", lambda size, stream=stream: stream[:size])
        kept.append(module._kept(1000, LARGE))
    assert np.array_equal(kept[1], -kept[0] - 1)
    assert 400 < (kept[0] < 0).sum() < 600


def test_high_and_low_bits_at_the_width_that_is_used(seeded_bytes):
    drawn = rounded_gaussian(400_000, LARGE)
    sigma = CELLS * LARGE
    edges = np.append(np.append(-np.inf, np.linspace(-4.5, 4.5, 400)), np.inf)
    counts = np.histogram(drawn / sigma, np.nan_to_num(edges, posinf=20, neginf=-20))[0]
    assert chi_square_p_value(counts, cell_probabilities(edges, 1.0)) > 0.01
    assert chi_square_p_value(counts, cell_probabilities(edges, 1.02)) < 1e-6
    # Any ten neighbouring bits up to 2^-10 standard deviations are equally likely, and do not depend on the sign.
    for shift in (0, 3, 10, 20):
        bits = (drawn >> shift) & 1023
        assert chi_square_p_value(np.bincount(bits, minlength=1024), np.full(1024, 1 / 1024)) > 0.001
        table = np.stack([np.bincount(bits[side] >> 5, minlength=32) for side in (drawn < 0, drawn >= 0)])
        assert stats.chi2_contingency(table).pvalue > 0.001


def test_the_whole_reach_of_the_staircase_is_there():
    # The outermost cells are never seen, so their proposal is checked by its numbers.
    stairs = module._staircase()
    assert sum(stairs.weights) == 1 << 64
    column = 1 << module._COLUMN_BITS
    shares = [0] * len(stairs.weights)
    for own, (keep, alias) in enumerate(zip(stairs.keep_J.tolist(), stairs.alias_J.tolist(), strict=True)):
        assert 0 < keep <= column
        shares[own] += keep
        shares[alias] += column - keep
    assert shares == list(stairs.weights)
    for cell, weight in enumerate(stairs.weights):
        top = stairs.scale * (-Decimal(cell * cell) / (2 * CELLS**2)).exp()
        assert top <= weight  # else a probability would exceed 1
        assert float(stairs.height_J[cell]) == pytest.approx(float(top / weight), rel=1e-6)
    # Little is rejected: the weights are the densities, except in the tail, where 1 is the least weight.
    rejected = 1 - math.sqrt(math.pi / 2) * CELLS * float(stairs.scale) / 2**64
    assert 0 < rejected < 1 / 150


def kept_at_margin(monkeypatch, margin: float, num: int, width: int, further: bytes) -> tuple[np.ndarray, int]:
    """The numbers kept of the same proposals and the same further bits, and how many comparisons were exact."""
    words = np.random.default_rng(3).bytes(16 * num)
    exact = []

    def urandom(size: int) -> bytes:
        if size == len(words):
            return words
        exact.append(size)
        return further * size

    monkeypatch.setattr("os.urandom", urandom)
    monkeypatch.setattr(module, "_MARGIN", margin)
    return module._kept(num, width), len(exact) // 2


@pytest.mark.parametrize("further", [b"\x00", b"\xff"])
@pytest.mark.parametrize(("width", "most"), [(LARGE, 20), (8, 4000)])
def test_floating_point_decides_as_exact_arithmetic_does(monkeypatch, width, most, further):
    num = 12_000
    quick, few = kept_at_margin(monkeypatch, module._MARGIN, num, width, further)
    exact, all_of_them = kept_at_margin(monkeypatch, 2.0, num, width, further)
    assert few < most
    assert all_of_them == num
    assert np.array_equal(quick, exact)
    assert num * 0.98 < len(exact) < num


def probability(cell: int, place: Decimal, width: int) -> Decimal:
    """To keep a number at a real place of its cell."""
    stairs = module._staircase()
    distance = cell + place / width
    return stairs.scale * (-distance * distance / (2 * CELLS**2)).exp() / stairs.weights[cell]


@given(
    cell=st.integers(0, 1023),
    place=st.floats(0, 1, exclude_max=True),
    width=st.integers(1, MAX_WIDTH),
    remainder=st.floats(0, 1, exclude_max=True),
    to_compare=st.integers(0, (1 << 16) - 1),
    further=st.floats(0, 1, exclude_max=True),
)
@example(cell=0, place=0.0, width=MAX_WIDTH, remainder=0.0, to_compare=65535, further=0.999)
@example(cell=0, place=0.0, width=MAX_WIDTH, remainder=0.0, to_compare=65535, further=0.0)
@example(cell=560, place=0.0, width=1, remainder=0.9999, to_compare=1, further=0.5)
@example(cell=800, place=0.5, width=LARGE, remainder=0.5, to_compare=1, further=0.5)
@settings(deadline=None, max_examples=200)
def test_the_margin_exceeds_every_error(cell, place, width, remainder, to_compare, further):
    whole = int(place * width)
    lead = module._lead(np.array([cell]), np.array([whole]), width, np.array([to_compare], np.uint64))[0]
    exact = probability(cell, whole + Decimal(remainder), width) - (to_compare + Decimal(further)) / (1 << 16)
    error = abs(float(exact) - float(lead))
    assert error < module._margin(width)
    assert error < 2.0**-20 + 2.0**-17 + 0.2503 / width  # rounding is a small part of it


@pytest.mark.parametrize(("cell", "place", "width"), [(0, 0, 1), (64, 0, 1), (200, 1, 2), (700, 5, LARGE)])
def test_the_exact_comparison_uses_all_of_its_bits(monkeypatch, cell, place, width):
    # Just below the probability a number is kept and just above it is not, wherever in the step its place is.
    for remainder in (0, 1 << 191, (1 << 192) - 1):
        edge = int(probability(cell, place + Decimal(remainder) / (1 << 192), width) * (1 << 60)) << 148
        for beside, kept in ((-(1 << 150), True), (1 << 150, False)):
            to_compare, further = divmod(min(max(edge + beside, 0), (1 << 208) - 1), 1 << 192)
            bits = iter([remainder.to_bytes(24, "big"), further.to_bytes(24, "big")])
            monkeypatch.setattr("os.urandom", lambda _, bits=bits: next(bits))
            expected = kept and edge + beside > 0
            assert module._keeps_exactly(cell, place, width, to_compare) == expected


def test_moments(seeded_bytes):
    num = 400_000
    z = rounded_gaussian(num, LARGE) / (CELLS * LARGE)
    assert abs(z.mean()) < 4 / math.sqrt(num)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / num)
    assert abs(stats.skew(z)) < 4 * math.sqrt(6 / num)
    assert abs(stats.kurtosis(z)) < 4 * math.sqrt(24 / num)


def test_numbers_do_not_depend_on_each_other(seeded_bytes):
    num = 200_000
    z = rounded_gaussian(num, LARGE) / (CELLS * LARGE)
    again = rounded_gaussian(num, LARGE) / (CELLS * LARGE)
    assert abs(np.mean(z * again)) < 4 / math.sqrt(num)
    for lag in (1, 2, 7, module.CHUNK):
        for one, other in ((z[lag:], z[:-lag]), (z[lag:] ** 2 - 1, (z[:-lag] ** 2 - 1) / 2)):
            assert abs(np.mean(one * other)) < 4 / math.sqrt(num - lag)


def test_any_number_of_numbers(seeded_bytes):
    for num in (0, 1, 2, module.CHUNK - 1, module.CHUNK + 1):
        drawn = rounded_gaussian(num, MAX_WIDTH)
        assert drawn.shape == (num,)
        assert drawn.dtype == np.int64
    for width in (0, -1, MAX_WIDTH + 1):
        with pytest.raises(ValueError, match="width"):
            rounded_gaussian(1, width)


def test_the_workspace_does_not_grow_with_the_numbers():
    rounded_gaussian(1, LARGE)
    tracemalloc.start()
    drawn = rounded_gaussian(1_000_000, LARGE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < drawn.nbytes + 8_000_000
