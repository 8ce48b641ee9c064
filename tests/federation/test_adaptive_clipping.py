"""Where the clip adapts, everything is measured by the current one: the bound, the noise, and the count that moves it.

Each training starts where the clip is a quarter of the first one, or four times that.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from helpers.tiny_federation import DP, tiny_federation
from trilemma.federation import local_training, units
from trilemma.federation import round as federated_round
from trilemma.federation.round import run_round
from trilemma.federation.state import EVERYBODY
from trilemma.federation.training import initial_state

FIRST, NOISE, COUNT_NOISE = 0.02, 1.4, 1.1
ADAPTIVE = {"kind": "adaptive", "count_noise": COUNT_NOISE, "learning_rate": 0.5}
#: One step, long enough that the rounding of the weights is small beside it; the norms are far above the clip.
STEP = {"batch_size": 16, "steps": 1, "momentum": 0, "learning_rate": 100.0}
TRUSTS = {
    "local": {"trust": "local"},
    "distributed": {"trust": "distributed", "num_colluding": 1},
    "client": {"unit": "client", "trust": "central"},
}
UNITS = {"images": "example", "patients": "patient", "patients of very many images": "patient"}
CASES = [("client", "images"), *((trust, unit) for trust in ("local", "distributed") for unit in UNITS)]

small_and_large = pytest.mark.parametrize(("trust", "unit"), CASES)
far_from_the_first = pytest.mark.parametrize("factor", [0.25, 4])


def federation_at(trust, unit, monkeypatch, first=FIRST, **changes):
    """Three hospitals with one step each, and how many of a hospital's units a step's sum is divided by."""
    privacy = {**DP, "clip": first, "noise_multiplier": NOISE, "clipping": ADAPTIVE, "unit": UNITS[unit]}
    if unit == "patients of very many images":  # every patient has two
        monkeypatch.setattr(units, "IMAGES_TOGETHER", 1)
    return tiny_federation(privacy={**privacy, **TRUSTS[trust], **changes}, local=STEP)


def state_at(federation, clip):
    names = [client.name for client in federation.clients]
    local = federation.plan is None and federation.spec.privacy.trust == "local"
    return replace(initial_state(federation), clips=dict.fromkeys(names if local else [EVERYBODY], clip))


def sum_of_a_round(federation, start) -> np.ndarray:
    """The noised sum over all units of all hospitals, from what a round does to the model."""
    moved_P = run_round(federation, start).params_P - start.params_P
    if federation.plan is not None:
        return moved_P.numpy() * federation.plan.denominator
    return moved_P.numpy() * len(federation.clients) * STEP["batch_size"] / -STEP["learning_rate"]


@small_and_large
@far_from_the_first
def test_one_unit_moves_the_sum_by_the_current_clip(trust, unit, factor, monkeypatch):
    federation = federation_at(trust, unit, monkeypatch)
    start, missing = state_at(federation, factor * FIRST), []
    if trust == "client":
        everybody = federated_round.who_takes_part
        monkeypatch.setattr(
            federated_round, "who_takes_part", lambda *a: [c for c in everybody(*a) if c.number not in missing]
        )
    else:

        def all_but_one(spec, client, *_):
            left_out = missing if client.number == 2 else []
            yield [number for number in range(6) if number not in left_out]

        monkeypatch.setattr(local_training, "batches", all_but_one)
        monkeypatch.setattr(federated_round, "drawn_records", lambda *_: None)
    whole = sum_of_a_round(federation, start)
    missing.append(1)
    moved = np.linalg.norm(whole - sum_of_a_round(federation, start))
    assert moved == pytest.approx(factor * FIRST, rel=1e-3)


@small_and_large
@far_from_the_first
def test_the_noise_of_the_sum_is_that_of_the_current_clip(trust, unit, factor, monkeypatch):
    federation = federation_at(trust, unit, monkeypatch)
    nobody = (replace(c, plan=c.plan and replace(c.plan, sampling_rate=1e-12)) for c in federation.clients)
    plan = federation.plan and replace(federation.plan, sampling_rate=0)
    federation = replace(federation, clients=tuple(nobody), plan=plan)
    noise = sum_of_a_round(federation, state_at(federation, factor * FIRST))
    # Each hospital's own, one of which may be missing under "distributed"; or the server's.
    shares = {"local": 3, "distributed": 3 / 2, "client": 1}[trust]
    sigma = (NOISE**-2 - (2 * COUNT_NOISE) ** -2) ** -0.5 * factor * FIRST * shares**0.5
    assert stats.kstest(noise, "norm", args=(0, sigma)).pvalue > 0.01
    assert stats.kstest(noise, "norm", args=(0, sigma * 2 / 3)).pvalue < 1e-6
    assert stats.kstest(noise, "norm", args=(0, sigma * 3 / 2)).pvalue < 1e-6


@pytest.mark.parametrize("trust", TRUSTS)
@far_from_the_first
def test_the_noise_of_the_honest_counts_together_is_what_was_promised(trust, factor, monkeypatch):
    federation = federation_at(trust, "images", monkeypatch)
    plans = [federation.plan] if federation.plan else [client.plan for client in federation.clients]
    honest = {"local": plans[:1], "distributed": plans[1:], "client": plans}[trust]
    sources = [plan.noise_source(np.random.default_rng(number)) for number, plan in enumerate(honest)]
    norms = torch.full((6,), FIRST)  # below the clip, or above it
    expected = len(honest) * (3 if factor > 1 else -3)
    counts = [
        sum(plan.noised_count(norms, noise, factor * FIRST) for plan, noise in zip(honest, sources, strict=True))
        for _ in range(1500)
    ]
    assert stats.kstest(counts, "norm", args=(expected, COUNT_NOISE)).pvalue > 0.01
    assert stats.kstest(counts, "norm", args=(expected, COUNT_NOISE * 2 / 3)).pvalue < 1e-6
    assert stats.kstest(counts, "norm", args=(expected, COUNT_NOISE * 3 / 2)).pvalue < 1e-6


@small_and_large
def test_the_norms_are_counted_against_the_current_clip_and_it_moves_from_there(trust, unit, monkeypatch):
    # With hardly any noise. The norms are far above the one and far below the other.
    quiet = {"noise_multiplier": 0.01, "clipping": {**ADAPTIVE, "count_noise": 0.1}}
    for first, current, moves in ((1e4, 1e-2, math.exp(0.5 / 2)), (1e-2, 1e4, math.exp(-0.5 / 2))):
        federation = federation_at(trust, unit, monkeypatch, first, **quiet)
        clients = (
            replace(c, plan=c.plan and replace(c.plan, sampling_rate=1.0, denominator=float(c.num_units)))
            for c in federation.clients
        )
        federation = replace(federation, clients=tuple(clients))
        for clip in run_round(federation, state_at(federation, current)).clips.values():
            assert clip == pytest.approx(current * moves, rel=0.08)
