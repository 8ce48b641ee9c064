import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny_federation import DP, tiny_dataset, tiny_federation, tiny_spec, trained_state
from trilemma.federation import local_training
from trilemma.federation.augmentation import augment
from trilemma.federation.clients import Client, Shard
from trilemma.federation.local_training import (
    batches,
    learning_rate,
    load_batch,
    load_model,
    local_train,
    mean_gradient,
)
from trilemma.federation.specs import Augmentation
from trilemma.federation.training import initial_state
from trilemma.models.classifier import Classifier
from trilemma.models.vector import get_params
from trilemma.privacy.clipping_rules import Flat
from trilemma.privacy.plan import PrivacyPlan
from trilemma.randomness import generator, numpy_generator
from trilemma.robustness.objectives import standard


def train(federation, position=0, plan=None, spec=None, round_index=0):
    client = replace(federation.clients[position], plan=plan)
    spec = spec or federation.spec
    state = initial_state(tiny_federation())
    load_model(federation.classifier, state.params_P, state.buffers_Q)
    return local_train(spec, client, federation.classifier, client.shards[0].records, round_index)


@pytest.mark.parametrize("defence", [{"kind": "none"}, {"kind": "fgsm", "radius": "4/255"}])
def test_no_clipping_and_no_noise_is_plain_sgd_on_the_same_batches(defence, monkeypatch):
    augmentation = {"shift": 1, "flip": True}
    local = {"batch_size": 8, "steps": 4, "weight_decay": 0.01, "augmentation": augmentation}
    federation = tiny_federation(local=local, defence=defence)
    index = [list(range(start, start + 8)) for start in (0, 8, 16, 4)]
    monkeypatch.setattr(local_training, "batches", lambda *_: iter(index))
    # A private training has streams of its own; here both must draw the same.
    monkeypatch.setattr(local_training, "client_stream", lambda spec, _, role, i: (spec.seed, role, i, 0))
    plain = train(federation)
    private = train(federation, plan=PrivacyPlan(32, 0.25, 8.0, Flat(float("inf")), 0.0))
    assert plain.update_P.norm() > 0.05
    assert torch.allclose(private.update_P, plain.update_P, rtol=1e-4, atol=1e-6)
    assert private.loss == pytest.approx(plain.loss, rel=1e-5)
    clipped = train(federation, plan=PrivacyPlan(32, 0.25, 8.0, Flat(0.01), 0.0))
    assert not torch.allclose(clipped.update_P, plain.update_P, rtol=1e-1)


def test_an_empty_private_batch_is_noise_alone_and_has_no_loss():
    federation = tiny_federation(local={"batch_size": 16, "steps": 1, "learning_rate": 1, "momentum": 0})
    result = train(federation, plan=PrivacyPlan(32, 1e-9, 16.0, Flat(0.5), 2.0))
    assert result.loss != result.loss
    assert float(result.update_P.std()) == pytest.approx(2.0 * 0.5 / 16, rel=0.1)


def test_plain_batches_are_shuffled_passes():
    federation = tiny_federation(local={"batch_size": 10, "epochs": 2})
    client = federation.clients[0]
    assert client.steps == 8
    steps = list(batches(federation.spec, client, 32, 0))
    assert [len(index) for index in steps] == [10, 10, 10, 2] * 2
    for one_pass in (steps[:4], steps[4:]):
        assert sorted(sum(one_pass, [])) == list(range(32))
    assert steps[:4] != steps[4:]
    assert steps == list(batches(federation.spec, client, 32, 0))
    assert steps != list(batches(federation.spec, client, 32, 1))
    assert steps != list(batches(federation.spec, federation.clients[1], 32, 0))


def test_steps_stop_within_a_pass():
    federation = tiny_federation(local={"batch_size": 10, "steps": 5})
    assert [len(i) for i in batches(federation.spec, federation.clients[0], 32, 0)] == [10, 10, 10, 2, 10]


def test_private_batches_come_from_the_plan():
    federation = tiny_federation(local={"batch_size": 16, "steps": 30}, privacy=DP)
    steps = list(batches(federation.spec, federation.clients[0], 32, 0))
    assert len(steps) == 30
    assert len({len(index) for index in steps}) > 3
    assert all(index == sorted(set(index)) for index in steps)


def test_the_cosine_falls_from_all_to_nothing():
    spec = tiny_spec(local={"schedule": "cosine", "learning_rate": 0.2}, rounds=4)
    assert learning_rate(spec, 0) == 0.2
    assert learning_rate(spec, 2) == pytest.approx(0.1)
    assert learning_rate(spec, 4) == pytest.approx(0, abs=1e-12)
    rates = [learning_rate(spec, time / 10) for time in range(41)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(tiny_spec(local={"learning_rate": 0.2}), 1.7) == 0.2


def test_fedprox_holds_the_clients_near():
    def distance(algorithm):
        local = {"batch_size": 8, "steps": 8, "momentum": 0}
        return train(tiny_federation(local=local, algorithm=algorithm)).update_P

    free = distance({"kind": "fedavg"})
    held = distance({"kind": "fedprox", "mu": 5.0})
    assert float(held.norm()) < 0.9 * float(free.norm())
    assert torch.allclose(distance({"kind": "fedprox", "mu": 1e-9}), free, atol=1e-6)


def test_fedprox_adds_mu_times_the_way_from_the_start():
    # The first step starts at the round's model and feels nothing; the second feels mu * (w1 - w0).
    rate, mu = 0.05, 3.0
    local = {"batch_size": 32, "steps": 1, "momentum": 0, "learning_rate": rate}
    one = tiny_federation(local=local, algorithm={"kind": "fedprox", "mu": mu})
    first_P = train(one).update_P
    free, held = (
        train(tiny_federation(local={**local, "steps": 2}, algorithm=algorithm)).update_P
        for algorithm in ({"kind": "fedavg"}, {"kind": "fedprox", "mu": mu})
    )
    assert torch.allclose(held, free - rate * mu * first_P, atol=1e-5)


def test_a_parameter_that_plays_no_part_stays():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(4, 2)
            self.spare = nn.Linear(3, 3)

        def forward(self, x_BCHW):
            return self.used(x_BCHW.flatten(1))

    classifier = Classifier(Spare(), 2)
    x_BCHW, y_B = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 0, 1, 1])
    gradient_P, _ = mean_gradient(classifier, standard(), x_BCHW, y_B, torch.Generator())
    assert gradient_P.shape == get_params(classifier).shape
    assert gradient_P[:10].any()
    assert not gradient_P[10:].any()


def test_mean_gradient_of_a_linear_model_by_hand():
    layer = nn.Linear(4, 2, bias=False)
    nn.init.zeros_(layer.weight)
    classifier = Classifier(nn.Sequential(nn.Flatten(), layer), 2, mean=0.0, std=1.0)
    x_BCHW = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]).view(2, 1, 2, 2)
    gradient_P, loss_B = mean_gradient(classifier, standard(), x_BCHW, torch.tensor([0, 1]), torch.Generator())
    # (softmax - one-hot) x^T / 2 with softmax = (1/2, 1/2)
    assert gradient_P.tolist() == pytest.approx([-0.25, 0.25, 0, 0, 0.25, -0.25, 0, 0])
    assert loss_B.tolist() == pytest.approx([0.6931472, 0.6931472])


def test_dropout_is_seeded_by_client_and_round():
    dataset = tiny_dataset()
    classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)), 3)
    client = Client("a", 0, (Shard(0, False, dataset.train),), None, 2, 1.0)
    spec, start = tiny_spec(), get_params(classifier)

    def update(round_index):
        load_model(classifier, start, torch.empty(0))
        return local_train(spec, client, classifier, dataset.train, round_index).update_P

    first = update(0)
    torch.rand(3)
    assert torch.equal(update(0), first)
    assert not torch.equal(update(1), first)


def test_every_step_round_and_client_has_noise_of_its_own_at_the_rate_of_its_time():
    # Batches are empty here, so that the update is the noise alone: reused noise could be subtracted away.
    local = {"batch_size": 16, "steps": 2, "learning_rate": 1.0, "momentum": 0, "schedule": "cosine"}
    federation = tiny_federation(local=local, rounds=2)
    plan, updates = PrivacyPlan(32, 1e-12, 16.0, Flat(0.5), 2.0), []
    for round_index, position in ((0, 0), (0, 1), (1, 0), (1, 1)):
        update_P = train(federation, position, plan, round_index=round_index).update_P
        draws = numpy_generator(0, "noise", federation.spec.key, "f0", round_index, position)
        expected_P = torch.zeros_like(update_P)
        for step in (0, 1):
            rate = 0.5 * (1 + math.cos(math.pi * (round_index + step / 2) / 2))
            expected_P -= rate * torch.from_numpy(draws.standard_normal(len(update_P), np.float32)) * 2.0 * 0.5 / 16.0
        assert torch.allclose(update_P, expected_P, atol=1e-5)
        updates.append(update_P)
    correlation = torch.corrcoef(torch.stack(updates)) - torch.eye(4)
    assert float(correlation.abs().max()) < 5 / len(updates[0]) ** 0.5


def test_two_trainings_of_one_seed_share_no_noise_and_no_private_batches():
    # If they did, the difference of two released models would be free of the noise.
    local = {"batch_size": 16, "steps": 1, "learning_rate": 1.0, "momentum": 0}
    empty = PrivacyPlan(32, 1e-12, 16.0, Flat(0.5), 2.0)
    updates, batch_lists = [], []
    for rounds in (2, 3):  # any field that differs makes another training
        federation = tiny_federation(local=local, rounds=rounds)
        updates.append(train(federation, 0, empty).update_P)
        client = replace(federation.clients[0], plan=PrivacyPlan(32, 0.5, 16.0, Flat(0.5), 2.0), steps=4)
        batch_lists.append(list(batches(federation.spec, client, 32, 0)))
    assert abs(float(torch.corrcoef(torch.stack(updates))[0, 1])) < 5 / len(updates[0]) ** 0.5
    assert batch_lists[0] != batch_lists[1]


def test_a_defence_warms_up_with_the_rounds():
    plain, warm = (
        trained_state(tiny_federation(defence=defence), rounds=1)
        for defence in ({"kind": "none"}, {"kind": "fgsm", "radius": 0.1, "warmup": 0.9})
    )
    assert torch.equal(plain.params_P, warm.params_P)
    plain, warm = (
        trained_state(tiny_federation(defence=defence))
        for defence in ({"kind": "none"}, {"kind": "fgsm", "radius": 0.1, "warmup": 0.9})
    )
    assert not torch.equal(plain.params_P, warm.params_P)


CHANGED = {"shift": 1, "flip": True}


def test_one_copy_is_the_image_itself_bit_for_bit():
    records = tiny_dataset().train
    x, y = load_batch(
        Augmentation(**CHANGED), records, [4, 0, 9], torch.Generator().manual_seed(1), torch.device("cpu")
    )
    assert torch.equal(x, augment(records.x([4, 0, 9]), 1, True, torch.Generator().manual_seed(1)))
    assert y.tolist() == records.y([4, 0, 9]).tolist()


def test_copies_stand_side_by_side_and_are_changed_each_in_its_own_way():
    records = tiny_dataset().train
    index, draws = [4, 0, 9], torch.Generator().manual_seed(1)
    x, y = load_batch(Augmentation(**CHANGED, multiplicity=4), records, index, draws, torch.device("cpu"))
    assert x.shape == (12, 1, 8, 8) and y.tolist() == records.y([4] * 4 + [0] * 4 + [9] * 4).tolist()
    for start, record in zip((0, 4, 8), index, strict=True):
        assert any(not torch.equal(x[start], x[start + i]) for i in (1, 2, 3))
        # A shift and a flip make no grey levels that the image does not have.
        inner = set(records.x([record]).flatten().tolist())
        assert all(value in inner for value in x[start : start + 4].flatten().tolist())
    empty, none = load_batch(Augmentation(**CHANGED, multiplicity=4), records, [], draws, torch.device("cpu"))
    assert empty.shape == (0, 1, 8, 8) and none.shape == (0,)


def test_equal_copies_are_refused():
    with pytest.raises(ValueError, match="equal copies.*give a shift or flip"):
        Augmentation(multiplicity=2)
    assert Augmentation(flip=True, multiplicity=2).multiplicity == 2


def test_plain_training_takes_the_mean_over_the_copies(monkeypatch):
    monkeypatch.setattr(local_training, "batches", lambda *_: iter([[3, 8]]))
    local = {"batch_size": 2, "steps": 1, "momentum": 0, "learning_rate": 1.0}
    federation = tiny_federation(local={**local, "augmentation": {**CHANGED, "multiplicity": 5}})
    update_P = train(federation).update_P
    client, state = federation.clients[0], initial_state(tiny_federation())
    draws = generator(0, "augmentation", 0, 0)
    x = augment(client.shards[0].records.x([3] * 5 + [8] * 5), 1, True, draws)
    load_model(federation.classifier, state.params_P, state.buffers_Q)
    y = client.shards[0].records.y([3] * 5 + [8] * 5)
    gradient_P, _ = mean_gradient(federation.classifier, standard(), x, y, torch.Generator())
    assert torch.allclose(update_P, -gradient_P, atol=1e-6)
    other = train(tiny_federation(local={**local, "augmentation": CHANGED})).update_P
    assert not torch.allclose(update_P, other, rtol=1e-2)


@pytest.mark.parametrize("unit", ["example", "patient"])
def test_all_copies_of_a_unit_are_clipped_as_one(unit, monkeypatch):
    local = {"batch_size": 16, "steps": 1, "momentum": 0, "learning_rate": 1.0}
    local["augmentation"] = {**CHANGED, "multiplicity": 6}
    monkeypatch.setattr(local_training, "batches", lambda *_: iter([[3]]))
    federation = tiny_federation(local=local, privacy={**DP, "unit": unit})
    plan = replace(federation.clients[0].plan, noise_multiplier=0.0, clipper=Flat(1e-3), denominator=1.0)
    result = train(federation, plan=plan)
    # The copies' gradients point much the same way: clipped one by one, they would add up to nearly six clips.
    assert float(result.update_P.norm()) == pytest.approx(1e-3, rel=1e-3)
    assert result.loss == result.loss
    same = {**local, "augmentation": CHANGED}
    assert not torch.equal(train(tiny_federation(local=same, privacy=DP), plan=plan).update_P, result.update_P)
