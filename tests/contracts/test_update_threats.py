"""What every train-time threat on updates promises, and that it does what its paper says on a quadratic."""

from statistics import NormalDist
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trilemma.attacks.poisoning.malformed import HUGE
from trilemma.attacks.poisoning.on_updates import (
    Adaptive,
    Alie,
    Gaussian,
    InnerProduct,
    Malformed,
    Mimic,
    MinMax,
    MinSum,
    Scaling,
    SignFlip,
)
from trilemma.attacks.poisoning.scene import Scene
from trilemma.attacks.poisoning.specs import LabelFlip, ThreatSpec
from trilemma.attacks.poisoning.threat import Threat
from trilemma.attacks.poisoning.updates import alie_z, min_max, min_sum
from trilemma.federation.aggregation.rule import Received
from trilemma.federation.aggregation.specs import (
    GeometricMedian,
    Mean,
    Median,
    MultiKrum,
    NormClipping,
    TrimmedMean,
)
from trilemma.federation.aggregation.updates import Updates

HONEST, BAD, P = 8, 2, 30
M = {"num_malicious": BAD}
CLEVER = [
    SignFlip(**M),
    Gaussian(**M),
    Scaling(**M),
    Alie(**M, z=1.5),
    InnerProduct(**M),
    MinMax(**M),
    MinMax(**M, direction="std"),
    MinSum(**M),
    MinSum(**M, direction="sign"),
    MinMax(**M, stretch=3.0),
    MinSum(**M, stretch=3.0),
    Mimic(**M),
    Adaptive(**M),
    *(kind(**M, knows="own") for kind in (Alie, InnerProduct, MinMax, MinSum, Adaptive)),
]
FLAWED = [Malformed(**M, flaw=flaw) for flaw in ("nan", "infinity", "shape", "huge", "replay")]
every_threat = pytest.mark.parametrize("threat", [*CLEVER, *FLAWED], ids=lambda threat: threat.label)
every_clever = pytest.mark.parametrize("threat", CLEVER, ids=lambda threat: threat.label)


def rows(seed: int, n: int = HONEST + BAD) -> torch.Tensor:
    """Updates that agree on a direction, with noise of the same length."""
    draws = torch.Generator().manual_seed(seed)
    return (torch.ones(P) + torch.randn(n, P, generator=draws)) / P**0.5


def rule(spec=None):
    apply = (spec or Mean()).make().apply

    def aggregate(matrix):
        n = len(matrix)
        received = Received(Updates(matrix), torch.full((n,), 1 / n), tuple(range(n)), torch.Generator().manual_seed(0))
        return apply(received, {})[0]

    return aggregate


def scene(matrix, memory=None, aggregate=None, seed=0) -> Scene:
    return Scene(
        own_MP=matrix[HONEST:].clone(),
        honest_NP=matrix[:HONEST].clone(),
        num_honest=HONEST,
        share=BAD / len(matrix),
        senders=tuple(range(HONEST, len(matrix))),
        aggregate=aggregate or rule(),
        draws=torch.Generator().manual_seed(seed),
        memory=memory or {},
    )


def sent(threat, matrix, **how) -> torch.Tensor:
    return torch.stack(threat.forge(scene(matrix, **how))[0])


def test_every_member_is_here():
    changing = {kind for kind in get_args(get_args(ThreatSpec)[0]) if kind.forge is not Threat.forge}
    assert {type(threat) for threat in [*CLEVER, *FLAWED]} == changing
    assert all(threat.on_updates for threat in [*CLEVER, *FLAWED])


def test_labels_tell_threats_apart():
    labels = [threat.label for threat in [*CLEVER, *FLAWED]]
    assert len(set(labels)) == len(labels)


@every_threat
def test_what_is_handed_to_it_stays_as_it_is_and_its_generator_alone_decides(threat):
    matrix = rows(0)
    handed = scene(matrix)
    first, memory = threat.forge(handed)
    assert len(first) == BAD
    assert torch.equal(handed.own_MP, matrix[HONEST:]) and torch.equal(handed.honest_NP, matrix[:HONEST])
    torch.manual_seed(3)
    again, _ = threat.forge(scene(matrix))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert all(isinstance(value, torch.Tensor) for value in memory.values())


@every_clever
def test_what_is_clever_is_well_formed(threat):
    for memory in ({}, threat.forge(scene(rows(0)))[1]):
        update = sent(threat, rows(1), memory=memory)
        assert update.shape == (BAD, P) and update.isfinite().all() and update.dtype == torch.float32


@every_clever
def test_where_no_honest_client_takes_part_it_still_sends_something(threat):
    handed = scene(rows(0))._replace(honest_NP=torch.zeros(0, P))
    update = torch.stack(threat.forge(handed)[0])
    assert update.shape == (BAD, P) and update.isfinite().all()


@every_clever
def test_without_a_difference_between_updates_there_is_still_a_number(threat):
    assert sent(threat, torch.ones(HONEST + BAD, P)).isfinite().all()
    assert sent(threat, torch.zeros(HONEST + BAD, P)).isfinite().all()


def test_who_looks_at_others():
    assert {threat.label for threat in CLEVER if threat.sees_others} == {
        threat.label for threat in CLEVER if getattr(threat, "knows", "own") == "honest"
    }
    matrix = rows(0)
    for threat in CLEVER:
        if not threat.sees_others and threat.kind != "adaptive":  # which asks the rule about them
            other = matrix.clone()
            other[:HONEST] = 7.0
            assert torch.equal(sent(threat, matrix), sent(threat, other)), threat.label


def test_each_does_what_its_paper_says():
    matrix = rows(0)
    honest, own = matrix[:HONEST], matrix[HONEST:]
    mean, deviation = honest.mean(0), honest.std(0, correction=0)
    torch.testing.assert_close(sent(SignFlip(**M, scale=3), matrix), -3 * own)
    torch.testing.assert_close(sent(Scaling(**M, scale=7), matrix), 7 * own)
    torch.testing.assert_close(sent(InnerProduct(**M, scale=2), matrix)[0], -2 * mean)
    torch.testing.assert_close(sent(Alie(**M, z=1.5), matrix)[1], mean - 1.5 * deviation)
    noise = sent(Gaussian(num_malicious=BAD, scale=5), torch.ones(HONEST + BAD, 20_000))
    assert (noise.norm(dim=1) / 20_000**0.5).tolist() == pytest.approx([5, 5], rel=0.03)
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise[0] @ noise[1])) / 20_000 < 1


def test_a_little_is_as_far_out_as_enough_honest_clients_are():
    # Of 50 clients with 24 attackers two more must be won over: Baruch et al. (2019), section 3.2.
    assert alie_z(50, 24) == pytest.approx(NormalDist().inv_cdf(24 / 26))
    assert alie_z(50, 24) == pytest.approx(1.426, abs=1e-3)
    assert alie_z(10, 2) == 0 and alie_z(10, 5) > alie_z(10, 4) > 0
    assert alie_z(3, 3) == 0  # nobody is honest


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 9999), st.sampled_from(["unit", "std", "sign"]), st.integers(2, 9), st.sampled_from([1, 4]))
def test_min_max_and_min_sum_go_as_far_as_they_may_and_no_farther(seed, direction, n, stretch):
    known = rows(seed, n)
    distances = stretch * torch.cdist(known.double(), known.double())
    far = min_max(known, direction, stretch).double()
    assert (far - known).norm(dim=1).max() == pytest.approx(float(distances.max()), rel=1e-4)
    beyond = known.mean(0) + 1.02 * (far - known.mean(0))
    assert (beyond - known).norm(dim=1).max() > distances.max() * (1 - 1e-6)
    together = min_sum(known, direction, stretch).double()
    assert (together - known).square().sum() == pytest.approx(float(distances.square().sum(1).max()), rel=1e-4)
    against = torch.dot((far - known.mean(0)).double(), known.mean(0).double())
    assert direction == "std" or against < 0


@pytest.mark.parametrize(("scale", "turned"), [(3.0, False), (5.0, True)])
def test_the_inner_product_turns_beyond_the_papers_bound(scale, turned):
    matrix = rows(0)  # (n - f) / f = 4
    honest = matrix[:HONEST].mean(0)
    whole = torch.cat([matrix[:HONEST], sent(InnerProduct(**M, scale=scale), matrix)])
    assert (float(whole.mean(0) @ honest) < 0) == turned


def test_mimic_sends_one_honest_update_and_stays_with_the_one_that_differs():
    outlier, memory = 3, {}
    for seed in range(6):
        matrix = rows(seed)
        matrix[outlier] = matrix[outlier] + 4 * torch.linspace(-1, 1, P)
        chosen, memory = Mimic(**M).forge(scene(matrix, memory=memory))
        assert torch.equal(chosen[0], matrix[outlier]) and torch.equal(chosen[1], matrix[outlier])
    assert int(memory["rounds"]) == 6


@pytest.mark.parametrize(
    "spec", [Mean(), Median(), TrimmedMean(num_byzantine=2), MultiKrum(num_byzantine=2), GeometricMedian()], ids=str
)
def test_who_knows_the_rule_does_it_more_harm_than_who_does_not(spec):
    """Along the honest mean, which is what it is after; over several rounds."""
    pulled = {}
    threats = [Adaptive(**M), Alie(**M, z=1.5), MinMax(**M), InnerProduct(**M, scale=0.5)]
    for threat in threats:
        total = 0.0
        for seed in range(5):
            matrix, aggregate = rows(seed), rule(spec)
            honest = torch.nn.functional.normalize(matrix[:HONEST].mean(0), dim=0)
            whole = torch.cat([matrix[:HONEST], sent(threat, matrix, aggregate=aggregate)])
            total += float(aggregate(whole) @ honest)
        pulled[threat.kind] = total
    assert pulled["adaptive"] == min(pulled.values())
    clean = sum(float(rule(spec)(rows(s)[:HONEST]) @ rows(s)[:HONEST].mean(0)) for s in range(5))
    assert pulled["adaptive"] < clean


def test_who_knows_the_clip_sends_no_more_than_it_lets_through():
    matrix, spec = rows(0), NormClipping(bound=1.0)
    whole = torch.cat([matrix[:HONEST], sent(Adaptive(**M), matrix, aggregate=rule(spec))])
    honest = matrix[:HONEST].mean(0)
    left = rule(spec)(torch.cat([matrix[:HONEST], honest.expand(BAD, -1)])) @ honest
    assert rule(spec)(whole) @ honest < left


def descended(threat, steps=30) -> tuple[float, float]:
    """Distances from the minimum of a quadratic, in all and the last, over steps by the mean of noisy gradients."""
    distances, best, point, memory = [], torch.zeros(P), torch.full((P,), 3.0), {}
    offsets = torch.linspace(-1, 1, HONEST + BAD)[:, None] * torch.linspace(0, 1, P)  # every client has its own minimum
    offsets = offsets - offsets[:HONEST].mean(0)
    for step in range(steps):
        noise = torch.randn(HONEST + BAD, P, generator=torch.Generator().manual_seed(step))
        matrix = -0.3 * (point - best - offsets + 0.5 * noise)
        if threat is not None:
            update, memory = threat.forge(scene(matrix, memory=memory, seed=step))
            matrix = torch.cat([matrix[:HONEST], torch.stack(update)])
        else:
            matrix = matrix[:HONEST]
        point = (point + matrix.mean(0)).clamp(-1e6, 1e6)
        distances.append(float((point - best).norm()))
    return sum(distances), distances[-1]


@every_clever
def test_on_a_quadratic_the_mean_takes_the_longer_way(threat):
    (attacked, end), (clean, clean_end) = descended(threat), descended(None)
    if threat.kind == "mimic":  # which is no slower, and ends nearer to the minimum of the client that it mimics
        assert end > 1.1 * clean_end
    else:
        assert attacked > 1.01 * clean


def test_boosted_data_and_model_replacement():
    matrix = rows(0)
    own = matrix[HONEST:]
    torch.testing.assert_close(sent(LabelFlip(**M), matrix), own)
    assert not LabelFlip(**M).on_updates
    torch.testing.assert_close(sent(LabelFlip(**M, boost=3.0), matrix), 3 * own)
    replaced = LabelFlip(**M, boost="replace")
    assert replaced.on_updates
    whole = torch.cat([torch.zeros(HONEST, P), sent(replaced, matrix)])
    torch.testing.assert_close(whole.mean(0), own.mean(0))


def test_flaws():
    matrix = rows(0)
    sent_by = {threat.flaw: threat.forge(scene(matrix)) for threat in FLAWED}
    assert all(int(update.isnan().sum()) == 1 for update in sent_by["nan"][0])
    assert all(int(update.isinf().sum()) == 1 for update in sent_by["infinity"][0])
    assert all(update.shape != (P,) for update in sent_by["shape"][0])
    assert all(float(update.double().norm()) == pytest.approx(HUGE) for update in sent_by["huge"][0])
    firsts, memory = sent_by["replay"]
    again, _ = FLAWED[-1].forge(scene(rows(1), memory=memory))
    assert all(torch.equal(a, b) and torch.equal(a, m) for a, b, m in zip(firsts, again, matrix[HONEST:], strict=True))
