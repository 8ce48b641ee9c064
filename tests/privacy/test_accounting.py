import math

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant

from trilemma.privacy import accounting
from trilemma.privacy.accounting import MIN_DELTA, MIN_NOISE, PRV_LIMIT, accountant_name, epsilon, noise_multiplier
from trilemma.privacy.guarantee import DpEvent

# noise multiplier, records, batch, epochs, delta; epsilon by Opacus 1.6.0's PRV and by dp_accounting 0.6.0's PLD.
ANCHORS = [
    (1.0, 4708, 64, 20, 1e-4, 2.630, 2.620),
    (1.0, 942, 64, 20, 1e-3, 5.631, 5.621),
    (2.0, 11959, 256, 30, 1e-5, 1.729, 1.719),
    (0.7, 89996, 512, 10, 1e-6, 4.093, 4.083),
    (10.0, 500, 500, 40, 1e-5, 2.604, 2.594),  # no sampling: 2.5944 by the Gaussian mechanism's closed form
]


def event(noise=1.0, rate=0.02, steps=100) -> DpEvent:
    return DpEvent(noise_multiplier=noise, sampling_rate=rate, steps=steps)


@pytest.mark.parametrize(("noise", "records", "batch", "epochs", "delta", "prv", "pld"), ANCHORS)
def test_anchors_by_two_accountants(noise, records, batch, epochs, delta, prv, pld):
    rate, steps = batch / records, int(epochs * records / batch)
    ours = epsilon([event(noise, rate, steps)], delta)
    assert ours == pytest.approx(prv, abs=0.005)
    other = PLDAccountant()
    other.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    outside = other.get_epsilon(delta)
    assert outside == pytest.approx(pld, abs=0.005)
    assert outside - 0.002 <= ours <= outside + 0.015


@pytest.mark.parametrize("delta", [1e-8, MIN_DELTA])
@pytest.mark.parametrize(("noise", "rate", "steps"), [(0.8, 0.01, 500), (1.0, 0.02, 1000), (0.6, 0.05, 100)])
def test_at_a_small_delta_it_is_a_bound_too(noise, rate, steps, delta):
    other = PLDAccountant()
    other.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    outside = other.get_epsilon(delta)
    assert outside - 0.002 <= epsilon([event(noise, rate, steps)], delta) <= outside + 0.015


@pytest.mark.parametrize("delta", [9e-11, 1e-13, 1e-15, 1e-30])
def test_what_an_old_book_holds_at_a_smaller_delta_is_bounded_all_the_same(delta):
    # By PRV it would be 6.466 at 1e-13, where PLD says 6.504, and an error at 1e-15.
    other = PLDAccountant()
    other.compose(PoissonSampledDpEvent(0.01, GaussianDpEvent(0.8)), 500)
    outside = other.get_epsilon(max(delta, 1e-13))
    assert (
        outside <= epsilon([event(0.8, 0.01, 500)], delta) < 1.2 * outside * max(1, math.log(delta) / math.log(1e-13))
    )


def test_events_compose_over_rounds():
    whole = epsilon([event(steps=300)], 1e-5)
    assert epsilon([event(steps=100)] * 3, 1e-5) == pytest.approx(whole, abs=0.003)
    assert epsilon([event(steps=100)], 1e-5) < epsilon([event(steps=200)], 1e-5) < whole
    mixed = epsilon([event(noise=1.0), event(noise=3.0)], 1e-5)
    assert epsilon([event(noise=1.0)], 1e-5) < mixed < epsilon([event(noise=1.0)] * 2, 1e-5)


def test_nothing_ran_costs_nothing():
    assert epsilon([], 1e-5) == 0.0
    assert epsilon([event(steps=0)], 1e-5) == 0.0
    assert epsilon([event(steps=0), event(steps=50)], 1e-5) == epsilon([event(steps=50)], 1e-5)


@settings(deadline=None, max_examples=3)
@given(
    target=st.floats(0.3, 50),
    delta=st.sampled_from([1e-3, 1e-5, 1e-6]),
    rate=st.floats(0.01, 0.2),
    steps=st.integers(20, 300),
)
@example(target=0.3, delta=1e-5, rate=1.0, steps=10)
@example(target=8.0, delta=1e-4, rate=256 / 1569, steps=140)
@example(target=0.05, delta=1e-5, rate=0.05, steps=100)
def test_calibration_meets_its_target_and_wastes_little(target, delta, rate, steps):
    noise = noise_multiplier(target, delta, rate, steps)
    achieved = epsilon([event(noise, rate, steps)], delta)
    assert achieved <= target
    assert achieved > 0.99 * target or noise == MIN_NOISE


def test_calibration_is_monotone():
    base = noise_multiplier(2, 1e-5, 0.02, 10)
    assert noise_multiplier(4, 1e-5, 0.02, 10) < base
    assert noise_multiplier(2, 1e-5, 0.02, 40) > base
    assert noise_multiplier(2, 1e-5, 0.08, 10) > base
    assert noise_multiplier(2, 1e-7, 0.02, 10) > base


def test_out_of_reach_is_said():
    with pytest.raises(ValueError, match="epsilon 0.001 at delta 1e-05 is out of reach in 10 steps"):
        noise_multiplier(0.001, 1e-5, 0.1, 10)


def test_a_target_that_needs_no_noise_worth_speaking_of_gets_the_least():
    assert noise_multiplier(1e6, 1e-5, 0.01, 1) == MIN_NOISE


def test_hardly_any_noise_is_bounded_cheaply_and_finitely(monkeypatch):
    # PRV takes gigabytes here, and returns infinity.
    def refuse(*_):
        raise AssertionError("the PRV accountant was asked")

    monkeypatch.setattr(PRVAccountant, "get_epsilon", refuse)
    for noise in (0.3, 0.1, 0.01):
        claimed = epsilon([event(noise, 0.5, 5000)], 1e-5)
        assert PRV_LIMIT < claimed < float("inf")
        assert "RDP where epsilon exceeds" in accountant_name(claimed)


def test_where_rdp_stands_in_it_is_the_looser_bound():
    below, above = event(0.55, 0.1, 500), event(0.5, 0.2, 300)
    exact = accounting._prv_epsilon(((0.5, 0.2, 300),), 1e-5)
    claimed = epsilon([above], 1e-5)
    assert claimed > PRV_LIMIT
    assert exact <= claimed < 1.15 * exact
    assert epsilon([below], 1e-5) < PRV_LIMIT
    assert "RDP" not in accountant_name(epsilon([below], 1e-5))
