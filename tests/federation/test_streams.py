"""Whose random numbers are whose: what a private training draws, and what it shares with nobody."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny_federation import DP, tiny_dataset, tiny_federation, tiny_spec
from trilemma.data.records import Records
from trilemma.federation import local_training
from trilemma.federation.clients import Client, Shard
from trilemma.federation.local_training import CRAFTED_TOGETHER, batches, crafted, load_model, local_train
from trilemma.federation.round import run_round, who_takes_part
from trilemma.federation.streams import client_stream
from trilemma.federation.training import initial_state
from trilemma.models.classifier import Classifier
from trilemma.models.vector import get_params
from trilemma.privacy.clipping_rules import Flat
from trilemma.privacy.plan import PrivacyPlan
from trilemma.robustness.specs import FgsmTraining

ROLES = ("augmentation", "defence", "dropout")
CLIENT = {**DP, "unit": "client", "trust": "central"}


def noise_images(num: int, seed: int = 0) -> Records:
    random = np.random.default_rng(seed)
    nothing = np.zeros(num, np.int64)
    images = random.random((num, 1, 8, 8), np.float32)
    return Records(images, random.integers(0, 3, num), nothing - 1, nothing, nothing.astype(str))


def everybody(num: int, noise: str = "system") -> PrivacyPlan:
    """Every record in every step, and noise that is hardly any."""
    return PrivacyPlan(num, 1.0, 1.0, Flat(1.0), 1e-4, noise=noise)


def sum_of_a_step(records: Records, noise: str = "system", dropout: float = 0.0, **changes) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, 3)
    classifier = Classifier(nn.Sequential(*layers), 3)
    local = {"batch_size": 1, "steps": 1, "learning_rate": 1.0, "momentum": 0, **changes.pop("local", {})}
    client = Client("a", 0, (Shard(0, False, records),), everybody(len(records), noise), 1, 1.0, fingerprint="f0")
    return -local_train(tiny_spec(local=local, **changes), client, classifier, records, 0).update_P


SHIFTED = {"local": {"augmentation": {"shift": 3, "flip": True}}}
STARTED = {"defence": {"kind": "pgd", "radius": 0.5, "steps": 1, "step_size": 0.01}}


def test_without_privacy_the_streams_have_the_names_they_always_had():
    federation = tiny_federation()
    for role in ROLES:
        assert client_stream(federation.spec, federation.clients[2], role, 5) == (0, role, 5, 2)


def test_seeded_streams_of_private_trainings_are_named_by_training_and_images():
    one, other = tiny_federation(privacy=DP), tiny_federation(privacy=DP, rounds=3)
    spec, client = one.spec, one.clients[1]
    changed = replace(client, fingerprint="f1")
    for role in ROLES:
        named = [
            client_stream(spec, client, role, 0), client_stream(spec, client, role, 1),
            client_stream(spec, one.clients[0], role, 0), client_stream(spec, changed, role, 0),
            client_stream(other.spec, client, role, 0),
        ]  # fmt: skip
        assert len(set(named)) == 5
        assert named[0] == client_stream(spec, client, role, 0) == (0, role, spec.key, "f0", 0, 1)


def test_with_noise_from_the_system_no_stream_comes_from_the_seed():
    federation = tiny_federation(privacy={**DP, "noise": "system"})
    seeds = [client_stream(federation.spec, federation.clients[0], role, 0)[0] for role in ROLES for _ in range(20)]
    assert len(set(seeds)) == 60 and min(seeds) > 2**64  # 256 bits, none of them the study's


@pytest.mark.parametrize("changes", [SHIFTED, STARTED, {"dropout": 0.5}], ids=ROLES)
def test_a_round_with_noise_from_the_system_draws_everything_anew(changes):
    records = noise_images(12)
    fresh = [sum_of_a_step(records, **changes) for _ in range(2)]
    assert float((fresh[0] - fresh[1]).norm()) > 0.5
    repeated = [sum_of_a_step(records, "seeded", **changes) for _ in range(2)]
    assert torch.equal(*repeated)
    still = [sum_of_a_step(records) for _ in range(2)]
    assert float((still[0] - still[1]).norm()) < 0.01  # there is no other source


@pytest.mark.parametrize("changes", [SHIFTED, STARTED, {"dropout": 0.5}], ids=ROLES)
def test_a_record_moves_the_mean_over_all_draws_by_the_clip_at_most(changes, monkeypatch):
    # The first of 24 records is taken away, so that all others move up and meet other draws.
    records = noise_images(24)
    fewer = records.subset(np.arange(1, 24))

    def difference(repetitions):
        sums = [[sum_of_a_step(held, **changes) for _ in range(repetitions)] for held in (records, fewer)]
        return float((torch.stack(sums[0]).mean(0) - torch.stack(sums[1]).mean(0)).norm())

    assert difference(80) < 1.0 + 0.3  # means of 80: off by less than 0.8, nearly all of it across the true difference
    monkeypatch.setattr(local_training, "client_stream", lambda spec, client, role, index: (spec.seed, role, index, 0))
    assert difference(1) > 4.0  # public draws, handed out by position


def noise_of(federation, fingerprint: str) -> torch.Tensor:
    """What a round without anybody adds to the model."""
    federation = replace(
        federation,
        clients=tuple(
            replace(c, fingerprint=fingerprint, plan=c.plan and replace(c.plan, sampling_rate=0.0))
            for c in federation.clients
        ),
        plan=federation.plan and replace(federation.plan, sampling_rate=0.0),
        fingerprint=fingerprint,
    )
    start = initial_state(tiny_federation())
    load_model(federation.classifier, start.params_P, start.buffers_Q)
    return run_round(federation, start).params_P - start.params_P


@pytest.mark.parametrize("privacy", [DP, CLIENT], ids=["local", "server"])
def test_other_images_under_an_equal_study_meet_other_noise(privacy):
    federation = tiny_federation(privacy=privacy)
    one, again, other = (noise_of(federation, fingerprint) for fingerprint in ("f0", "f0", "f1"))
    assert torch.equal(one, again) and float(one.norm()) > 0.1
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 5 / len(one) ** 0.5


def test_other_images_under_an_equal_study_meet_other_batches():
    dataset = tiny_dataset()
    for privacy in (DP, {**CLIENT, "delta": 0.1}):
        few = {"kind": "fedavg", "clients_per_round": 2}
        drawn = []
        for fingerprint in ("f0", "f0", "f1"):
            federation = tiny_federation(replace(dataset, fingerprint=fingerprint), privacy=privacy, algorithm=few)
            if privacy is DP:
                client = federation.clients[0]
                drawn.append([list(batches(federation.spec, client, 32, index)) for index in range(8)])
            else:
                drawn.append([[c.name for c in who_takes_part(federation, index)] for index in range(20)])
        assert drawn[0] == drawn[1] != drawn[2]


def test_a_large_private_batch_is_attacked_in_parts():
    classifier = tiny_federation().classifier.eval()
    objective, sizes = FgsmTraining(radius=8 / 255).make(), []

    def views(classifier, x_BCHW, y_B, draws):
        sizes.append(len(x_BCHW))
        return objective.views(classifier, x_BCHW, y_B, draws)

    watched = objective._replace(views=views)
    for num in (0, 1, CRAFTED_TOGETHER, CRAFTED_TOGETHER + 3):
        x_BCHW, y_B = torch.rand(num, 1, 8, 8), torch.zeros(num, dtype=torch.int64)
        ours = crafted(watched, classifier, x_BCHW, y_B, torch.Generator().manual_seed(0))
        assert ours.shape == (num, 1, 1, 8, 8)
        if 0 < num <= CRAFTED_TOGETHER:
            whole = objective.views(classifier, x_BCHW, y_B, torch.Generator().manual_seed(0))
            assert torch.equal(ours, whole)
        if num:
            assert float((ours[:, 0] - x_BCHW).abs().max()) == pytest.approx(8 / 255, rel=1e-3)
    assert sizes == [1, CRAFTED_TOGETHER, CRAFTED_TOGETHER, 3]
    assert get_params(classifier).isfinite().all()
