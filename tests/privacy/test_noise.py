"""Noise and sampling. What uses the operating system's randomness is tested at a false alarm below 1e-9."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from trilemma.privacy import noise
from trilemma.privacy.noise import LATTICE_BITS, noise_source_in_words, poisson_sample, seeded_noise, system_noise
from trilemma.privacy.rounded_gaussian import CELLS, MAX_WIDTH

FALSE_ALARM = 1e-9


def kolmogorov_smirnov(z: np.ndarray, sigma: float) -> tuple[float, float]:
    """The largest distance to a normal law, and the one that chance exceeds with FALSE_ALARM (Massart 1990)."""
    distance = stats.kstest(z, "norm", args=(0, sigma)).statistic
    return float(distance), math.sqrt(math.log(2 / FALSE_ALARM) / (2 * len(z)))


def low_bits(noised: np.ndarray, step: float) -> np.ndarray:
    """The eight lowest bits of multiples of `step`."""
    return np.rint(noised / step).astype(np.int64) & 255


def bits_p_value(one: np.ndarray, other: np.ndarray) -> float:
    """Chi-square of whether two inputs have the same eight lowest bits."""
    table = np.stack([np.bincount(bits, minlength=256) for bits in (one, other)])
    return float(stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue)


# --- noise from a seed


def test_seeded_noise_is_numpys_normal_numbers_times_the_deviation():
    sum_P = torch.linspace(-3, 3, 1000)
    generator = np.random.default_rng(5)
    draws = [torch.from_numpy(generator.standard_normal(1000, np.float32)) for _ in range(2)]
    add = seeded_noise(np.random.default_rng(5))
    assert torch.equal(add(sum_P, 0.7), sum_P + draws[0] * 0.7)
    assert torch.equal(add(sum_P, 2.5), sum_P + draws[1] * 2.5)


def test_a_guarantee_says_where_the_noise_came_from():
    assert "whoever knows the seed" in noise_source_in_words("seeded")
    # Stored guarantees hold this sentence, and the report knows them by it: reword it and they count as seeded.
    assert noise_source_in_words("system") == (
        "noise from the operating system's cryptographic source, exactly Gaussian and rounded to a lattice, "
        "so that its lowest bits tell nothing"
    )


# --- noise from the operating system


@pytest.mark.parametrize("standard_deviation", [1.0, 0.37, 1e-30, 3e25])
def test_the_noise_is_gaussian_with_the_deviation_that_is_accounted(standard_deviation):
    noised_P = system_noise()(torch.zeros(150_000), standard_deviation)
    assert noised_P.dtype == torch.float32
    z = noised_P.double().numpy() / standard_deviation
    distance, allowed = kolmogorov_smirnov(z, 1.0)
    assert distance < allowed
    for wrong in (2 / 3, 3 / 2):
        distance, allowed = kolmogorov_smirnov(z, wrong)
        assert distance > 2 * allowed


def test_the_noise_is_added_to_the_sum():
    sum_P = torch.linspace(-1000, 1000, 100_000)
    z = (system_noise()(sum_P, 0.5) - sum_P).double().numpy() / 0.5
    bound = stats.norm.isf(FALSE_ALARM / 2)
    assert abs(z.mean()) < bound / math.sqrt(len(z))
    assert abs(z.var() - 1) < 1.1 * bound * math.sqrt(2 / len(z))
    assert abs(np.corrcoef(z, sum_P)[0, 1]) < bound / math.sqrt(len(z))
    assert abs(np.mean(z[1:] * z[:-1])) < bound / math.sqrt(len(z))


def test_calls_share_nothing():
    add, sum_P = system_noise(), torch.zeros(50_000)
    one, other = add(sum_P, 1.0), add(sum_P, 1.0)
    assert not torch.equal(one, other)
    assert abs(float((one * other).mean())) < stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(50_000)
    assert not torch.equal(system_noise()(sum_P, 1.0), one)


def test_results_lie_on_the_lattice_whatever_the_sum():
    step = 2.0**-LATTICE_BITS  # at a deviation of 1, which is enlarged a little
    for value in (0.0, 1 / 3, -7.1, 1000.7, 1e-9):
        noised = system_noise()(torch.full((5000,), value, dtype=torch.float64), 1.0).numpy()
        assert np.array_equal(np.rint(noised / step) * step, noised)
    floating = seeded_noise(np.random.default_rng(0))
    noised = floating(torch.full((5000,), 1 / 3, dtype=torch.float64), 1.0).numpy()
    assert (np.rint(noised / step) * step != noised).mean() > 0.9  # floating-point noise fails this test


def test_the_lowest_bits_tell_nothing_of_the_sum():
    step = 2.0**-LATTICE_BITS
    values = (0.0, 1.0, 1 / 3, -1000.7)

    def bits(add) -> list[np.ndarray]:
        return [low_bits(add(torch.full((60_000,), v, dtype=torch.float64), 1.0).numpy(), step) for v in values]

    first, *others = bits(system_noise())
    for other in others:
        assert bits_p_value(first, other) > FALSE_ALARM

    def naive(sum_P, _):  # single-precision noise, as torch and numpy draw it for a single-precision sum
        return sum_P + torch.randn(sum_P.shape, generator=torch.Generator().manual_seed(1)).double()

    first, *others = bits(naive)
    assert min(bits_p_value(first, other) for other in others) < FALSE_ALARM


def share_of_coarse_results(add, value: float) -> float:
    """Mironov's (2012) attack: of the results near 0, how many are multiples of 2^-24, as 1 plus a float always is."""
    noised = add(torch.full((200_000,), value), 1.0).double().numpy()
    near = noised[np.abs(noised) < 2.0**-6]
    assert len(near) > 700
    return float((np.rint(near * 2**24) == near * 2**24).mean())


def test_the_attack_on_floating_point_noise_works_and_fails_here():
    floating = seeded_noise(np.random.default_rng(2))
    assert share_of_coarse_results(floating, 1.0) == 1.0
    assert share_of_coarse_results(floating, 0.0) < 0.5  # so a result that is no multiple proves that the sum was 0
    at_0, at_1 = (share_of_coarse_results(system_noise(), value) for value in (0.0, 1.0))
    assert at_0 < 0.1
    assert abs(at_0 - at_1) < 0.06  # six deviations of shares of some .03 among 700


def test_the_draws_do_not_depend_on_the_sum(monkeypatch):
    # On equal bytes, two sums that are multiples of the lattice's step differ by just their difference.
    results = []
    for value in (0.0, 5.25):
        monkeypatch.setattr("os.urandom", np.random.default_rng(1).bytes)
        results.append(system_noise()(torch.full((1000,), value, dtype=torch.float64), 1.0))
    assert torch.equal(results[1] - results[0], torch.full((1000,), 5.25, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shape_type_and_input_are_left_as_they_are(dtype):
    sum_P = torch.ones(3, 5, dtype=dtype, requires_grad=True)
    noised_P = system_noise()(sum_P, 0.1)
    assert noised_P.shape == (3, 5)
    assert noised_P.dtype == dtype
    assert not noised_P.requires_grad
    assert torch.equal(sum_P.detach(), torch.ones(3, 5, dtype=dtype))
    assert (noised_P - 1).abs().max() < 1


def test_sums_of_no_numbers_and_numbers_that_are_none():
    add = system_noise()
    assert add(torch.zeros(0), 1.0).shape == (0,)
    strange_P = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45])
    noised_P = add(strange_P, 1.0)
    assert noised_P.isfinite().all()
    assert noised_P[[0, 5]].abs().max() < 16.5
    assert noised_P[[1, 3]].min() > 1e6
    assert (noised_P[1] - noised_P[3]).abs() < 33
    assert noised_P[[2, 4]].max() < -1e6
    assert add(torch.tensor([3e38], dtype=torch.float64), 1e-300).isfinite().all()


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_a_deviation_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="standard deviation"):
        system_noise()(torch.zeros(3), wrong)


@given(
    standard_deviation=st.floats(1e-300, 1e300),
    num=st.integers(1, 1 << 40),
    multiplier=st.floats(1e-3, 8000),
)
@example(standard_deviation=1.0, num=1 << 40, multiplier=8000.0)
@example(standard_deviation=math.nextafter(2.0, 0), num=1, multiplier=8000.0)
@settings(deadline=None, max_examples=200)
def test_the_deviation_makes_up_for_rounding_the_sum(standard_deviation, num, multiplier):
    exponent, width = noise._lattice(num, standard_deviation)
    assert 1 << 33 <= width <= MAX_WIDTH
    step = Fraction(2) ** exponent
    deviation, clip = CELLS * width * step, Fraction(standard_deviation) / Fraction(multiplier)
    root = Fraction(math.isqrt(num << 80) + 1, 1 << 40)
    moved = clip + step * root  # half a step for each number of either sum
    assert moved / deviation <= clip / Fraction(standard_deviation)
    assert deviation <= Fraction(standard_deviation) * Fraction(1.01)


def test_nobodys_global_generator_is_touched():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    system_noise()(torch.zeros(1000), 1.0)
    poisson_sample(1000, 0.3, None)
    seeded_noise(np.random.default_rng(0))(torch.zeros(1000), 1.0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])


# --- sampling


def test_sampling_by_a_seed_is_numpys_uniform_numbers_below_the_rate():
    drawn = poisson_sample(1000, 0.2, np.random.default_rng(3))
    uniform = np.random.default_rng(3).random(1000)
    assert drawn.tolist() == np.flatnonzero(uniform < 0.2).tolist()


def test_sampling_by_the_operating_system_has_64_bits(monkeypatch):
    rate = 0.3
    threshold = int(Fraction(rate) * 2**64)
    words = np.array([0, threshold - 1, threshold, 2**64 - 1], np.uint64)
    monkeypatch.setattr("os.urandom", lambda size: words.tobytes()[:size])
    assert poisson_sample(4, rate, None).tolist() == [0, 1]
    assert poisson_sample(4, math.nextafter(1.0, 0), None).tolist() == [0, 1, 2]
    assert poisson_sample(4, 1.0, None).tolist() == [0, 1, 2, 3]
    assert poisson_sample(4, 0.0, None).tolist() == []
    assert poisson_sample(0, 0.5, None).dtype == torch.int64


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_a_rate_that_is_none_is_refused(wrong):
    for generator in (None, np.random.default_rng(0)):
        with pytest.raises(ValueError, match="probability"):
            poisson_sample(3, wrong, generator)


def drawn_by(name: str, draws: int, num: int, rate: float) -> np.ndarray:
    """Which of `num` units each of `draws` batches has, by a sampler or by what is none."""
    random = np.random.default_rng(7)
    generator = np.random.default_rng(7)
    joined = np.zeros((draws, num), bool)
    for row in joined:
        match name:
            case "seeded":
                row[poisson_sample(num, rate, generator).numpy()] = True
            case "system":
                row[poisson_sample(num, rate, None).numpy()] = True
            case "fixed size":
                row[random.permutation(num)[: round(num * rate)]] = True
            case "in pairs":
                row[:] = np.repeat(random.random(num // 2) < rate, 2)
            case _:  # a few units twice as likely
                row[:] = random.random(num) < rate * (1 + (np.arange(num) < 5))
    return joined


def sampling_p_values(joined: np.ndarray, rate: float) -> dict[str, float]:
    """Chi-square of how often each unit joined, of batch sizes, and of neighbours joining together."""
    draws, num = joined.shape
    sizes = np.bincount(joined.sum(1), minlength=num + 1)
    expected = draws * stats.binom.pmf(np.arange(num + 1), num, rate)
    many = expected >= 5
    observed, expected = (np.append(n[many], n[~many].sum()) for n in (sizes, expected))
    spread = draws * rate * (1 - rate)
    both = (joined[:, ::2] & joined[:, 1::2]).sum(0)
    return {
        "units": float(stats.chi2.sf(((joined.sum(0) - draws * rate) ** 2).sum() / spread, num)),
        "sizes": float(stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1)),
        "pairs": float(
            stats.chi2.sf(((both - draws * rate**2) ** 2).sum() / (draws * rate**2 * (1 - rate**2)), num // 2)
        ),
    }


@pytest.mark.parametrize("name", ["seeded", "system"])
def test_sampling_is_poisson(name, monkeypatch):
    monkeypatch.setattr("os.urandom", np.random.default_rng(11).bytes)
    p_values = sampling_p_values(drawn_by(name, 4000, 100, 0.2), 0.2)
    assert min(p_values.values()) > 0.001


def test_sampling_by_the_operating_system_really_is_poisson():
    assert min(sampling_p_values(drawn_by("system", 4000, 100, 0.2), 0.2).values()) > FALSE_ALARM


@pytest.mark.parametrize(("name", "caught_by"), [("fixed size", "sizes"), ("in pairs", "pairs"), ("uneven", "units")])
def test_what_is_not_poisson_is_told_apart(name, caught_by):
    assert sampling_p_values(drawn_by(name, 4000, 100, 0.2), 0.2)[caught_by] < FALSE_ALARM
