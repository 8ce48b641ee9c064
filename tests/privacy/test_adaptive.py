import math

import numpy as np
import pytest
import torch
from dp_accounting import ComposedDpEvent, GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trilemma.privacy.accounting import epsilon
from trilemma.privacy.adaptive import WIDEST, Adaptation, centred_count
from trilemma.privacy.clipping_rules import Flat
from trilemma.privacy.noise import seeded_noise
from trilemma.privacy.plan import PrivacyPlan
from trilemma.privacy.specs import AdaptiveClipping, DpSgd


def adaptation(**changes) -> Adaptation:
    return Adaptation(**{"quantile": 0.5, "learning_rate": 0.2, "count_noise": 4.0, "first_clip": 1.0, **changes})


def test_both_sums_together_cost_what_is_accounted():
    # The two Gaussian releases, composed by another accountant, against one with the multiplier that we account.
    outside = PLDAccountant()
    sum_noise = adaptation(count_noise=0.9).sum_noise(1.2)
    outside.compose(ComposedDpEvent([GaussianDpEvent(sum_noise), GaussianDpEvent(2 * 0.9)]), 5)
    plan = PrivacyPlan(100, 1.0, 100.0, Flat(1.0), 1.2, adaptation(count_noise=0.9))
    assert epsilon([plan.event(5)], 1e-5) == pytest.approx(outside.get_epsilon(1e-5), abs=0.02)
    free = PLDAccountant()
    free.compose(GaussianDpEvent(1.2), 5)
    assert sum_noise > 1.2 and free.get_epsilon(1e-5) == pytest.approx(outside.get_epsilon(1e-5), abs=0.02)


@given(norms=st.lists(st.floats(0, 10), max_size=8), extra=st.floats(0, 10), clip=st.floats(0.1, 9))
def test_one_unit_moves_the_count_by_one_half(norms, extra, clip):
    with_it, without = centred_count(torch.tensor([*norms, extra]), clip), centred_count(torch.tensor(norms), clip)
    assert abs(with_it - without) == 0.5


def test_a_norm_that_is_no_number_lies_above():
    assert centred_count(torch.tensor([math.nan, math.inf, 1.0]), 2.0) == -0.5


def test_the_clip_moves_geometrically_by_hand():
    rule = adaptation(quantile=0.3)
    assert rule.moved(2.0, 10.0, 50.0) == pytest.approx(2.0 * math.exp(-0.2 * (10 / 50 + 0.5 - 0.3)))
    assert rule.moved(2.0, -25.0, 50.0) == pytest.approx(2.0 * math.exp(0.2 * 0.3))
    assert rule.moved(2.0, -10.0, 50.0) == pytest.approx(2.0)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_clip_finds_the_quantile(quantile):
    norms = torch.rand(400, generator=torch.Generator().manual_seed(0)) * 3
    plan = PrivacyPlan(400, 1.0, 400.0, Flat(30.0), 1.0, adaptation(quantile=quantile, first_clip=30.0))
    add_noise, clip = seeded_noise(np.random.default_rng(1)), 30.0
    for _ in range(150):
        clip = plan.adaptation.moved(clip, plan.noised_count(norms, add_noise, clip), 400.0)
    assert float((norms <= clip).float().mean()) == pytest.approx(quantile, abs=0.05)


@settings(max_examples=30)
@given(count=st.floats(-1e9, 1e9), clip=st.floats(1e-5, 1e5))
def test_no_run_of_noise_brings_the_clip_to_nothing_or_infinity(count, clip):
    for _ in range(20):
        clip = adaptation().moved(clip, count, 1.0)
    assert 1 / WIDEST <= clip <= WIDEST


def test_the_noise_on_both_sums_is_what_was_promised():
    plan = PrivacyPlan(100, 0.1, 10.0, Flat(0.5), 1.3, adaptation(count_noise=2.0, first_clip=0.5))
    add_noise = seeded_noise(np.random.default_rng(0))
    counts = [plan.noised_count(torch.ones(6), add_noise, 2.0) - 3 for _ in range(3000)]
    sums = plan.noised_mean(torch.zeros(4000), add_noise, 2.0) * 10
    sum_noise = (1.3**-2 - 4.0**-2) ** -0.5
    for noise, sigma in ((counts, 2.0), (sums.numpy(), sum_noise * 2.0)):
        assert stats.kstest(noise, "norm", args=(0, sigma)).pvalue > 0.01
        assert stats.kstest(noise, "norm", args=(0, sigma * 2 / 3)).pvalue < 1e-6
        assert stats.kstest(noise, "norm", args=(0, sigma * 3 / 2)).pvalue < 1e-6


def test_by_default_the_count_costs_little():
    for noise, units in ((0.6, 8), (1.0, 64), (5.0, 16), (1.0, 2000)):
        rule = AdaptiveClipping().adaptation(1.0, noise, units)
        assert noise < rule.sum_noise(noise) <= 1.033 * noise
        assert rule.count_noise >= units / 20


def test_a_count_that_costs_more_than_the_step_is_refused():
    spec = DpSgd(noise_multiplier=2.0, delta=1e-4, clipping={"kind": "adaptive", "count_noise": 1.0})
    with pytest.raises(ValueError, match="count_noise 1 must exceed 1, half the noise multiplier"):
        spec.make(500, 50, 10)
    made = DpSgd(noise_multiplier=1.9, delta=1e-4, clipping={"kind": "adaptive", "count_noise": 1.0}).make(500, 50, 10)
    assert made.event(1).noise_multiplier == 1.9
