import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from trilemma.models.specs import Resnet9
from trilemma.privacy.guarantee import NO_PRIVACY, DpEvent, Guarantee
from trilemma.privacy.plan import PrivacyPlan
from trilemma.privacy.specs import DpSgd, NoPrivacy
from trilemma.robustness.objectives import mean_cross_entropy


def plan(**changes) -> PrivacyPlan:
    return PrivacyPlan(**{
        "num_records": 400, "sampling_rate": 0.1, "denominator": 40.0, "clip": 0.5, "noise_multiplier": 1.3, **changes
    })  # fmt: skip


def p_value_of_rate(sampler: PrivacyPlan, rate: float, draws: int = 400) -> float:
    """Chi-square of how often each record was drawn, against independent draws at `rate`."""
    g = torch.Generator().manual_seed(0)
    counts = np.zeros(sampler.num_records)
    for _ in range(draws):
        counts[sampler.sample(g).numpy()] += 1
    statistic = ((counts - draws * rate) ** 2 / (draws * rate * (1 - rate))).sum()
    return float(stats.chi2.sf(statistic, sampler.num_records))


def test_every_record_is_drawn_at_the_rate():
    assert p_value_of_rate(plan(), 0.1) > 0.01
    assert p_value_of_rate(plan(sampling_rate=0.13), 0.1) < 1e-6
    assert p_value_of_rate(plan(), 0.13) < 1e-6


def test_the_batch_size_is_binomial_and_not_fixed():
    g = torch.Generator().manual_seed(1)
    sizes = np.array([len(plan().sample(g)) for _ in range(2000)])
    assert sizes.mean() == pytest.approx(40, abs=5 * np.sqrt(36 / 2000))
    assert sizes.var() == pytest.approx(36, rel=0.15)
    assert len(plan(num_records=3, sampling_rate=1e-9).sample(g)) == 0
    assert plan(num_records=5, sampling_rate=1.0).sample(g).tolist() == [0, 1, 2, 3, 4]


def test_records_join_independently_of_each_other():
    g = torch.Generator().manual_seed(2)
    drawn = np.zeros((3000, 2), bool)
    for row in drawn:
        row[:] = np.isin([0, 1], plan(num_records=10, sampling_rate=0.4).sample(g).numpy())
    table = np.histogram2d(*drawn.T, bins=2)[0]
    assert stats.chi2_contingency(table).pvalue > 0.01


def noise_p_value(sigma: float) -> float:
    sum_P = torch.arange(4000.0)
    noised = plan().noised_mean(sum_P, torch.Generator().manual_seed(3)) * 40 - sum_P
    return float(stats.kstest(noised.numpy(), "norm", args=(0, sigma)).pvalue)


def test_the_noise_is_gaussian_with_the_deviation_that_is_accounted():
    sigma = 1.3 * 0.5
    assert noise_p_value(sigma) > 0.01
    assert noise_p_value(sigma * 2 / 3) < 1e-6
    assert noise_p_value(sigma * 3 / 2) < 1e-6


def test_the_denominator_is_a_constant():
    # The same sum and noise give the same mean, whatever batch they came from; doubling it halves the mean.
    sum_P = torch.ones(5)
    means = [plan(denominator=d).noised_mean(sum_P, torch.Generator().manual_seed(0)) for d in (40.0, 80.0)]
    assert torch.allclose(means[0], 2 * means[1])
    classifier = Resnet9(width=4).make(1, 8, 2, seed=0)
    x, y = torch.rand(3, 1, 1, 8, 8), torch.tensor([0, 1, 0])
    for num in (0, 1, 3):
        clipped = plan().gradient_sum(classifier, mean_cross_entropy, x[:num], y[:num])
        mean = plan().noised_mean(clipped.sum_P, torch.Generator().manual_seed(0))
        noise = torch.randn(clipped.sum_P.shape, generator=torch.Generator().manual_seed(0)) * 1.3 * 0.5
        assert torch.allclose(mean * 40, clipped.sum_P + noise, atol=1e-5)


def test_without_clipping_and_noise_the_sum_is_only_divided():
    open_plan = plan(clip=float("inf"), noise_multiplier=0.0)
    assert torch.equal(open_plan.noised_mean(torch.ones(3), torch.Generator()), torch.full((3,), 1 / 40))


def test_the_event_says_what_ran():
    assert plan().event(7) == DpEvent(noise_multiplier=1.3, sampling_rate=0.1, steps=7)


def test_the_spec_makes_sampler_and_event_from_the_same_numbers():
    made = DpSgd(noise_multiplier=0.9, delta=1e-4, clip=2.0).make(num_records=500, batch_size=50, steps=10)
    assert made == PrivacyPlan(500, 0.1, 50.0, 2.0, 0.9)
    assert DpSgd(epsilon=3, delta=1e-4).make(500, 50, 10).noise_multiplier > 0.2


def test_labels():
    assert NoPrivacy().label == "no DP"
    assert DpSgd(epsilon=8, delta=1e-4).label == "DP epsilon 8"
    assert DpSgd(noise_multiplier=1.5, delta=1e-4).label == "DP noise 1.5"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give either epsilon"),
        ({"epsilon": 1, "noise_multiplier": 1}, "and not both"),
        ({"epsilon": 0}, "greater than 0"),
        ({"epsilon": -1}, "greater than 0"),
        ({"epsilon": float("inf")}, "finite"),
        ({"noise_multiplier": 0}, "greater than 0"),
        ({"epsilon": 1, "delta": 0}, "greater than 0"),
        ({"epsilon": 1, "delta": 1}, "less than 1"),
        ({"epsilon": 1, "clip": 0}, "greater than 0"),
        ({"epsilon": 1, "clip": float("inf")}, "finite"),
        ({"epsilon": 1, "unit": "patient"}, "example"),
        ({"epsilon": 1, "sigma": 1}, "Extra inputs"),
    ],
)
def test_impossible_requests_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        DpSgd(**{"delta": 1e-5, **fields})


def test_what_only_the_data_show_is_refused_when_the_plan_is_made():
    spec = DpSgd(epsilon=1, delta=1e-2)
    with pytest.raises(ValueError, match="not below 1 / 100 records"):
        spec.make(num_records=100, batch_size=10, steps=10)
    with pytest.raises(ValueError, match="batch_size 100 exceeds its 99 records"):
        spec.make(num_records=99, batch_size=100, steps=10)
    assert spec.make(num_records=99, batch_size=99, steps=1).sampling_rate == 1


def guarantee(**epsilons: float) -> Guarantee:
    return Guarantee(
        delta=1e-5, epsilon_by_client=epsilons, clip=0.5, accountant="PRV", noise_source="seeded", outside=("counts",)
    )


def test_epsilon_is_the_largest_and_every_hospital_is_named():
    claim = guarantee(north=2.0, south=3.12)
    assert claim.epsilon == 3.12
    words = claim.in_words()
    for part in ("exp(3.12)", "north 2.00", "south 3.12", "1e-05", "Clipping norm 0.5", "PRV", "seeded", "counts"):
        assert part in words


@pytest.mark.parametrize(("exact", "said"), [(2.001, "2.01"), (7.9999, "8.00"), (8.0, "8.00"), (1.1, "1.10")])
def test_words_never_claim_less_than_the_bound(exact, said):
    words = guarantee(north=exact).in_words()
    assert f"exp({said})" in words
    assert f"north {said}" in words


def test_void_hides_the_numbers():
    void = guarantee(north=2.0).voided("calibrated on private images").voided("stopped early")
    assert void.epsilon is None
    assert void.in_words() == "No guarantee: calibrated on private images; stopped early."
    assert void.epsilon_by_client == {"north": 2.0}
    assert guarantee(north=2.0).void == ()


def test_without_dp_nothing_is_claimed():
    assert NO_PRIVACY.epsilon is None
    assert NO_PRIVACY.in_words() == "No guarantee: training without differential privacy."
    assert Guarantee().epsilon is None
    assert Guarantee().in_words() == "No guarantee: nothing was accounted for."


def test_a_guarantee_survives_the_store():
    claim = guarantee(north=2.0)
    assert Guarantee.model_validate_json(claim.model_dump_json()) == claim


def test_an_infinite_epsilon_is_no_guarantee():
    with pytest.raises(ValidationError):
        guarantee(north=float("inf"))
