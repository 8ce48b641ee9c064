import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from trilemma.models.specs import Resnet9
from trilemma.privacy.clipping_rules import Flat
from trilemma.privacy.guarantee import NO_PRIVACY, DpEvent, Guarantee, group_in_words, of_group
from trilemma.privacy.noise import seeded_noise
from trilemma.privacy.plan import PrivacyPlan
from trilemma.privacy.specs import DpSgd, NoPrivacy
from trilemma.robustness.objectives import mean_cross_entropy


def plan(**changes) -> PrivacyPlan:
    return PrivacyPlan(**{
        "num_units": 400, "sampling_rate": 0.1, "denominator": 40.0, "clipper": Flat(0.5), "noise_multiplier": 1.3,
        **changes,
    })  # fmt: skip


def seeded(seed: int):
    return seeded_noise(np.random.default_rng(seed))


def p_value_of_rate(sampler: PrivacyPlan, rate: float, draws: int = 400) -> float:
    """Chi-square of how often each record was drawn, against independent draws at `rate`."""
    g = np.random.default_rng(0)
    counts = np.zeros(sampler.num_units)
    for _ in range(draws):
        counts[sampler.sample(g).numpy()] += 1
    statistic = ((counts - draws * rate) ** 2 / (draws * rate * (1 - rate))).sum()
    return float(stats.chi2.sf(statistic, sampler.num_units))


def test_every_record_is_drawn_at_the_rate():
    assert p_value_of_rate(plan(), 0.1) > 0.01
    assert p_value_of_rate(plan(sampling_rate=0.13), 0.1) < 1e-6
    assert p_value_of_rate(plan(), 0.13) < 1e-6


def test_the_batch_size_is_binomial_and_not_fixed():
    g = np.random.default_rng(1)
    sizes = np.array([len(plan().sample(g)) for _ in range(2000)])
    assert sizes.mean() == pytest.approx(40, abs=5 * np.sqrt(36 / 2000))
    assert sizes.var() == pytest.approx(36, rel=0.15)
    assert len(plan(num_units=3, sampling_rate=1e-9).sample(g)) == 0
    assert plan(num_units=5, sampling_rate=1.0).sample(g).tolist() == [0, 1, 2, 3, 4]


def test_records_join_independently_of_each_other():
    g = np.random.default_rng(2)
    drawn = np.zeros((3000, 2), bool)
    for row in drawn:
        row[:] = np.isin([0, 1], plan(num_units=10, sampling_rate=0.4).sample(g).numpy())
    table = np.histogram2d(*drawn.T, bins=2)[0]
    assert stats.chi2_contingency(table).pvalue > 0.01


def noise_p_value(sigma: float) -> float:
    sum_P = torch.arange(4000.0)
    noised = plan().noised_mean(sum_P, seeded(3)) * 40 - sum_P
    return float(stats.kstest(noised.numpy(), "norm", args=(0, sigma)).pvalue)


def test_the_noise_is_gaussian_with_the_deviation_that_is_accounted():
    sigma = 1.3 * 0.5
    assert noise_p_value(sigma) > 0.01
    assert noise_p_value(sigma * 2 / 3) < 1e-6
    assert noise_p_value(sigma * 3 / 2) < 1e-6


def test_the_denominator_is_a_constant():
    # The same sum and noise give the same mean, whatever batch they came from; doubling it halves the mean.
    sum_P = torch.ones(5)
    means = [plan(denominator=d).noised_mean(sum_P, seeded(0)) for d in (40.0, 80.0)]
    assert torch.allclose(means[0], 2 * means[1])
    classifier = Resnet9(width=4).make(1, 8, 2, seed=0)
    x, y = torch.rand(3, 1, 1, 8, 8), torch.tensor([0, 1, 0])
    for num in (0, 1, 3):
        clipped = plan().gradient_sum(classifier, mean_cross_entropy, x[:num], y[:num])
        mean = plan().noised_mean(clipped.sum_P, seeded(0))
        noise = seeded(0)(torch.zeros_like(clipped.sum_P), 1.3 * 0.5)
        assert torch.allclose(mean * 40, clipped.sum_P + noise, atol=1e-5)


def test_without_clipping_and_noise_the_sum_is_only_divided():
    open_plan = plan(clipper=Flat(float("inf")), noise_multiplier=0.0)
    assert torch.equal(open_plan.noised_mean(torch.ones(3), seeded(0)), torch.full((3,), 1 / 40))


def test_the_event_says_what_ran():
    assert plan().event(7) == DpEvent(noise_multiplier=1.3, sampling_rate=0.1, steps=7)


def test_the_spec_makes_sampler_and_event_from_the_same_numbers():
    made = DpSgd(noise_multiplier=0.9, delta=1e-4, clip=2.0).make(num_units=500, batch_size=50, steps=10)
    assert made == PrivacyPlan(500, 0.1, 50.0, Flat(2.0), 0.9)
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
        ({"epsilon": 1, "unit": "hospital"}, "example"),
        ({"epsilon": 1, "sigma": 1}, "Extra inputs"),
    ],
)
def test_impossible_requests_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        DpSgd(**{"delta": 1e-5, **fields})


def test_what_only_the_data_show_is_refused_when_the_plan_is_made():
    spec = DpSgd(epsilon=1, delta=1e-2)
    with pytest.raises(ValueError, match="not below 1 / 100 records"):
        spec.make(num_units=100, batch_size=10, steps=10)
    with pytest.raises(ValueError, match="batch_size 100 exceeds its 99 records"):
        spec.make(num_units=99, batch_size=100, steps=10)
    assert spec.make(num_units=99, batch_size=99, steps=1).sampling_rate == 1


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


def test_a_group_is_promised_what_the_theorem_gives_and_never_less_than_the_exact_bound():
    assert of_group(8.0, 1e-4, 1) == pytest.approx((8.0, 1e-4))
    assert of_group(8.0, 1e-4, 2) == pytest.approx((16.0, 0.5962), rel=1e-3)
    assert of_group(8.0, 1e-4, 3) == (24.0, 1.0)
    assert of_group(50.0, 1e-5, 1000)[1] == 1.0  # no overflow
    for epsilon, size in ((0.0, 5), (0.3, 4), (1.0, 6)):
        assert of_group(epsilon, 1e-5, size)[1] >= 1e-5 * sum(math.exp(i * epsilon) for i in range(size)) * (1 - 1e-9)


def test_a_group_in_words_is_rounded_up_and_says_where_nothing_is_left():
    assert group_in_words(8.0, 1e-4, 2) == "epsilon is 16.00 and delta 0.6"
    assert group_in_words(1.001, 1e-5, 3) == "epsilon is 3.01 and delta 0.00023"  # 0.0002221
    for delta in (1.0, 0.36786):  # the second: a delta of 0.9999, which is shown as 1
        assert group_in_words(0.307, delta, 2) == "nothing is promised, for that delta reaches 1"


#: A guarantee as the first version stored it.
STORED = (
    '{"unit":"example","relation":"add_or_remove_one","trust":"local","delta":0.0001,"epsilon_by_client":{"north":2.5},'
    '"events_by_client":{"north":[{"noise_multiplier":1.0,"sampling_rate":0.1,"steps":40}]},"clip":1.0,'
    '"accountant":"PRV accountant of Opacus 1.6.0","noise_source":"seeded noise, for research only",'
    '"outside":["the curves"],"void":[]}'
)


def test_an_older_stored_guarantee_still_loads_and_says_the_same():
    claim = Guarantee.model_validate_json(STORED)
    assert (claim.epsilon, claim.clipping, claim.num_colluding) == (2.5, "flat", 0)
    assert claim.in_words().startswith("With or without any one image of a hospital")
    assert "noise multiplier 1 in 40 steps at sampling rate 0.1" in claim.in_words()


def test_steps_that_differ_are_said_for_each_hospital_and_others_once():
    events = {
        name: (DpEvent(noise_multiplier=1.5, sampling_rate=rate, steps=steps),)
        for name, rate, steps in (("north", 0.1, 1), ("east", 0.1, 1), ("south", 0.25, 7))
    }
    words = guarantee(north=1, east=1, south=2).model_copy(update={"events_by_client": events}).in_words()
    assert "noise multiplier 1.5 in 1 step at sampling rate 0.1 (north, east)" in words
    assert "noise multiplier 1.5 in 7 steps at sampling rate 0.25 (south)" in words


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"unit": "patient"}, "DP epsilon 8 per patient"),
        ({"unit": "client", "trust": "central"}, "DP epsilon 8 per client"),
        ({"trust": "distributed", "num_colluding": 2}, "DP epsilon 8 distributed"),
        ({"clipping": {"kind": "per_layer"}}, "DP epsilon 8, per layer clipping"),
        ({"clipping": {"kind": "automatic"}}, "DP epsilon 8, automatic clipping"),
        (
            {"unit": "patient", "trust": "distributed", "clipping": {"kind": "adaptive", "quantile": 0.25}},
            "DP epsilon 8 per patient distributed, adaptive 25 % clipping",
        ),
    ],
)
def test_labels_tell_units_trust_and_clipping_apart(fields, label):
    assert DpSgd(epsilon=8, delta=1e-4, **fields).label == label


def test_a_share_of_the_noise_is_a_share_and_is_accounted_as_the_whole():
    shared = DpSgd(noise_multiplier=2.0, delta=1e-4, clip=0.5, trust="distributed").make(
        500, 50, 10, 2.0, num_honest=16
    )
    share = shared.noised_mean(torch.zeros(4000), seeded(5)).numpy() * 50
    assert stats.kstest(share, "norm", args=(0, 2.0 * 0.5 / 4)).pvalue > 0.01
    assert stats.kstest(share, "norm", args=(0, 2.0 * 0.5)).pvalue < 1e-6
    assert shared.event(3) == DpEvent(noise_multiplier=2.0, sampling_rate=0.1, steps=3)


def test_a_trusted_servers_plan_speaks_of_clients():
    spec = DpSgd(noise_multiplier=1.1, delta=1e-3, clip=2.0, unit="client", trust="central")
    assert spec.make_for_server(20, 5, 30) == PrivacyPlan(20, 0.25, 5.0, Flat(2.0), 1.1)
    with pytest.raises(ValueError, match="delta 0.001 is not below 1 / 1000 clients"):
        spec.make_for_server(1000, 5, 30)


def test_samples_and_noise_come_from_where_the_plan_says():
    g = np.random.default_rng(0)
    seeded_plan, system_plan = plan(), plan(noise="system")
    state = g.bit_generator.state
    assert len(system_plan.sample(g)) > 0 and system_plan.noise_source(g)(torch.zeros(5), 1.0).any()
    assert g.bit_generator.state == state  # the operating system was asked, and not the generator
    assert torch.equal(seeded_plan.sample(g), seeded_plan.sample(np.random.default_rng(0)))
    assert g.bit_generator.state != state
