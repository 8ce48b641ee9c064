import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny_federation import CPU, DP, equal_states, tiny_dataset, tiny_federation, tiny_spec, trained_state
from trilemma.data.records import Records
from trilemma.errors import UserError
from trilemma.federation import round as federated_round
from trilemma.federation.clients import Client, Shard
from trilemma.federation.local_training import LocalResult, batches, drawn_records
from trilemma.federation.round import mean_loss, run_round, watch
from trilemma.federation.server import Federation, server_step
from trilemma.federation.state import TrainingState
from trilemma.federation.training import guarantee, initial_state, trained_model
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9
from trilemma.models.vector import get_buffers, get_params
from trilemma.privacy.accounting import epsilon
from trilemma.privacy.guarantee import NO_PRIVACY

PLAIN = {"batch_size": 16, "steps": 2, "momentum": 0}


def records(images, labels) -> Records:
    images = np.array(images, np.float32).reshape(len(labels), 1, 2, 2)
    nothing = np.zeros(len(labels), np.int64)
    return Records(images, np.array(labels), nothing - 1, nothing, nothing.astype(str))


def linear_federation(weights, **changes) -> Federation:
    """Two hospitals with one image each, a linear model that starts at zero, one step of rate 1."""
    local = {"batch_size": 1, "steps": 1, "momentum": 0, "learning_rate": 1.0}
    spec = tiny_spec(local=local, partition={"kind": "iid", "num_clients": 2}, rounds=1, **changes)
    layer = nn.Linear(4, 2, bias=False)
    nn.init.zeros_(layer.weight)
    held = records([[1, 0, 0, 0]], [0]), records([[0, 1, 0, 0]], [1])
    clients = tuple(
        Client(f"c{i}", i, (Shard(i, False, r),), None, 1, w)
        for i, (r, w) in enumerate(zip(held, weights, strict=True))
    )
    return Federation(spec, clients, held[0], Classifier(nn.Sequential(nn.Flatten(), layer), 2, mean=0.0, std=1.0))


@pytest.mark.parametrize(("weights", "shares"), [((1.0, 1.0), (0.5, 0.5)), ((3.0, 1.0), (0.75, 0.25))])
def test_fedavg_of_a_linear_model_by_hand(weights, shares):
    # Each client moves by (one-hot - 1/2) x^T; the server takes their weighted mean.
    state = trained_state(linear_federation(weights))
    a, b = shares
    assert state.params_P.tolist() == pytest.approx([a / 2, -b / 2, 0, 0, -a / 2, b / 2, 0, 0])
    (row,) = state.history
    assert row["loss"] == pytest.approx(math.log(2))
    assert row["val_accuracy"] == 1.0


def test_fedavgm_by_hand_over_two_rounds():
    server = {"kind": "sgd", "learning_rate": 0.5, "momentum": 0.9}
    first = server_step(
        tiny_spec(server=server), torch.zeros(2), torch.tensor([1.0, -2.0]), {"velocity": torch.zeros(2)}
    )
    assert first[0].tolist() == [0.5, -1.0]
    second = server_step(tiny_spec(server=server), *first[:1], torch.tensor([1.0, 0.0]), first[1])
    assert second[0].tolist() == pytest.approx([0.5 + 0.5 * 1.9, -1.0 - 0.5 * 1.8])


def test_a_round_of_too_few_updates_for_its_rule_changes_nothing_and_says_so(monkeypatch):
    """Two of three updates are malformed: what is left is no majority."""
    federation = tiny_federation(tiny_dataset(), local=PLAIN, aggregation={"kind": "trimmed_mean", "num_byzantine": 1})
    state, real = initial_state(federation), federated_round.local_train

    def broken(spec, client, *arguments):
        result = real(spec, client, *arguments)
        return result if client is federation.clients[0] else result._replace(update_P=result.update_P * math.nan)

    monkeypatch.setattr(federated_round, "local_train", broken)
    after = run_round(federation, state)
    assert torch.equal(after.params_P, state.params_P)
    row = after.history[-1]
    assert row["refused"] == "aggregation 'trimmed_mean' needs 3 updates against 1 attackers, and a round has 1"
    assert row["dropped"] == [client.name for client in federation.clients]  # the sound one cannot be used either
    monkeypatch.undo()
    assert "refused" not in run_round(federation, state).history[-1]


def test_what_a_rule_remembers_goes_through_a_checkpoint():
    changes = {"local": PLAIN, "rounds": 3, "aggregation": {"kind": "centred_clipping", "radius": 0.05}}
    whole = trained_state(tiny_federation(tiny_dataset(), **changes))
    federation = tiny_federation(tiny_dataset(), **changes)
    one = run_round(federation, initial_state(federation))
    assert one.memory["point"].shape == one.params_P.shape
    packed = TrainingState.unpack(*one.pack(), torch.device("cpu"))
    for state in (one, packed):
        state = run_round(federation, run_round(federation, state))
        assert torch.equal(state.params_P, whole.params_P)


@pytest.mark.parametrize("kind", ["centralised", "local_only"])
def test_a_baseline_has_one_update_whatever_the_rule(kind):
    krum = {"kind": "krum", "num_byzantine": 5}
    states = [
        trained_state(tiny_federation(tiny_dataset(), local=PLAIN, algorithm={"kind": kind}, **rule))
        for rule in ({}, {"aggregation": krum})
    ]
    assert torch.equal(states[0].params_P, states[1].params_P)


def test_one_client_is_centralised_training():
    dataset = tiny_dataset()
    one = {"kind": "iid", "num_clients": 1}
    federated, central = (
        trained_state(tiny_federation(dataset, partition=one, local=PLAIN, algorithm={"kind": kind}))
        for kind in ("fedavg", "centralised")
    )
    assert torch.allclose(federated.params_P, central.params_P, atol=1e-6)
    assert [r["val_loss"] for r in federated.history] == pytest.approx([r["val_loss"] for r in central.history])


def test_the_order_of_the_clients_plays_no_part():
    federation = tiny_federation(local=PLAIN, model={"kind": "resnet9", "width": 4, "norm": "batch"})
    turned = replace(federation, clients=federation.clients[::-1])
    start = initial_state(federation)
    one, other = run_round(federation, start), run_round(turned, start)
    assert torch.allclose(one.params_P, other.params_P, atol=1e-6)
    assert torch.allclose(one.buffers_Q, other.buffers_Q, atol=1e-6)


KINDS = {
    "fedavg, server adam": {"server": {"kind": "adam"}},
    "server momentum, batch norm": {
        "server": {"kind": "sgd", "momentum": 0.9}, "model": {"kind": "resnet9", "width": 4, "norm": "batch"},
    },
    "centralised, momentum": {"algorithm": {"kind": "centralised"}},
    "averaged, batch norm": {"averaging": {"decay": 0.9}, "model": {"kind": "resnet9", "width": 4, "norm": "batch"}},
    "averaged, alone": {"averaging": {"decay": 0.5}, "algorithm": {"kind": "local_only", "client": 1}},
    "averaged, private, copies": {
        "averaging": {"decay": 0.9}, "privacy": DP,
        "local": {"batch_size": 16, "steps": 1, "augmentation": {"flip": True, "multiplicity": 3}},
    },
    "local only, adam": {
        "algorithm": {"kind": "local_only", "client": 2}, "local": {"optimizer": "adam", "batch_size": 16},
    },
    "private": {"privacy": DP},
    "adversarial, threat, half the clients": {
        "defence": {"kind": "fgsm"}, "threat": {"kind": "adversarial_samples", "num_malicious": 1, "steps": 1},
        "algorithm": {"kind": "fedprox", "clients_per_round": 2},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_training_goes_on_bit_for_bit(name):
    dataset = tiny_dataset()
    changes = {"rounds": 3, "local": {"batch_size": 16, "steps": 2, "schedule": "cosine"}, **KINDS[name]}
    undisturbed = trained_state(tiny_federation(dataset, **changes))
    again = trained_state(tiny_federation(dataset, **changes))
    assert equal_states(undisturbed, again)
    for killed_after in (1, 2):
        state = trained_state(tiny_federation(dataset, **changes), killed_after)
        tensors, texts = state.pack()
        assert equal_states(TrainingState.unpack(tensors, texts, CPU), state)
        resumed = trained_state(tiny_federation(dataset, **changes), state=TrainingState.unpack(tensors, texts, CPU))
        assert equal_states(resumed, undisturbed)
    other = trained_state(tiny_federation(dataset, **changes, seed=1))
    assert not torch.equal(other.params_P, undisturbed.params_P)


def test_a_state_with_a_part_missing_is_refused():
    tensors, texts = initial_state(tiny_federation()).pack()
    with pytest.raises(KeyError):
        TrainingState.unpack({"params": tensors["params"]}, texts, CPU)
    with pytest.raises(KeyError):
        TrainingState.unpack(tensors, {"round": "0"}, CPU)
    with pytest.raises(ValueError):
        TrainingState.unpack(tensors, {**texts, "history": "[{"}, CPU)


def sabotage(monkeypatch, bad_client, change):
    honest = federated_round.local_train

    def train(spec, client, classifier, *rest):
        result = honest(spec, client, classifier, *rest)
        return change(result) if client.name == bad_client else result

    monkeypatch.setattr(federated_round, "local_train", train)


def with_entry(value):
    def change(result):
        update_P = result.update_P.clone()
        update_P[3] = value
        return result._replace(update_P=update_P, loss=math.nan)

    return change


MALFORMED = {
    "nan": with_entry(math.nan),
    "infinity": with_entry(math.inf),
    "short": lambda result: result._replace(update_P=result.update_P[1:]),
    "matrix": lambda result: result._replace(update_P=result.update_P[None]),
    "buffers": lambda result: result._replace(buffers_Q=torch.tensor([math.nan])),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_update_is_dropped_and_named(name, monkeypatch):
    federation = tiny_federation(local=PLAIN)
    without = replace(federation, clients=federation.clients[:2])
    start = initial_state(federation)
    expected = run_round(without, start)
    sabotage(monkeypatch, "client 3", MALFORMED[name])
    state = run_round(federation, start)
    assert state.history[0]["dropped"] == ["client 3"]
    assert state.history[0]["clients"] == ["client 1", "client 2", "client 3"]
    assert torch.equal(state.params_P, expected.params_P)
    json.dumps(state.history, allow_nan=False)  # what the store does


@pytest.mark.parametrize("algorithm", [{"kind": "fedavg"}, {"kind": "centralised"}])
def test_when_every_update_is_broken_nothing_moves_and_the_next_round_can(algorithm, monkeypatch):
    federation = tiny_federation(algorithm=algorithm, server={"kind": "adam"}, rounds=3)
    start = run_round(federation, initial_state(federation))
    nan_P = torch.full_like(start.params_P, math.nan)
    broken = LocalResult(nan_P, start.buffers_Q, math.nan, {"velocity": nan_P})
    with monkeypatch.context() as patch:
        patch.setattr(federated_round, "local_train", lambda *_: broken)
        state = run_round(federation, start)
    assert torch.equal(state.params_P, start.params_P)
    assert state.server.keys() == start.server.keys()
    assert all(torch.equal(state.server[name], start.server[name]) for name in start.server)
    row = state.history[-1]
    assert row["dropped"] == row["clients"]
    assert row["loss"] is None
    healed = run_round(federation, state)
    assert healed.history[-1]["dropped"] == []
    assert healed.history[-1]["loss"] > 0


def test_a_training_that_diverges_stays_storable():
    federation = tiny_federation(local={"batch_size": 16, "steps": 6, "learning_rate": 1e18}, rounds=2)
    state = trained_state(federation)
    assert state.params_P.isfinite().all()
    json.dumps(state.history, allow_nan=False)


def test_history_says_what_happened_and_what_was_sent():
    model = {"kind": "resnet9", "width": 4, "norm": "batch"}
    federation = tiny_federation(model=model, algorithm={"kind": "fedavg", "clients_per_round": 2})
    state = trained_state(federation)
    numbers = state.params_P.numel() + state.buffers_Q.numel()
    assert state.buffers_Q.numel() > 0
    for index, row in enumerate(state.history):
        assert row.keys() == {
            "round", "clients", "dropped", "loss", "val_accuracy", "val_loss", "bytes_up", "bytes_down",
            "bytes_up_by_client", "bytes_down_by_client", "seconds"
        }  # fmt: skip
        assert row["round"] == index + 1
        assert len(row["clients"]) == 2
        assert row["bytes_up"] == row["bytes_down"] == 4 * numbers * 2
        assert row["bytes_up_by_client"] == row["bytes_down_by_client"] == dict.fromkeys(row["clients"], 4 * numbers)
        assert row["seconds"] > 0
        assert 0 <= row["val_accuracy"] <= 1
        assert row["val_loss"] > 0


def test_the_baselines_send_images_once_or_nothing():
    dataset = tiny_dataset()
    central = trained_state(tiny_federation(dataset, algorithm={"kind": "centralised"})).history
    assert [row["bytes_up"] for row in central] == [dataset.train.images_NCHW.nbytes, 0]
    alone = trained_state(tiny_federation(dataset, algorithm={"kind": "local_only"})).history
    assert {row["bytes_up"] + row["bytes_down"] for row in alone} == {0}


def test_watch_counts_every_record_once(monkeypatch):
    dataset = tiny_dataset()
    classifier = tiny_federation(dataset).classifier
    with torch.no_grad():
        logits = classifier.eval()(dataset.val.x())
    seen = watch(classifier, dataset.val, batch_size=7)
    assert seen["val_accuracy"] == pytest.approx(float((logits.argmax(1) == dataset.val.y()).float().mean()))
    assert seen["val_loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, dataset.val.y())), rel=1e-5)
    assert watch(classifier, dataset.val.subset(np.array([], int))) == {"val_accuracy": None, "val_loss": None}


def test_missing_losses_are_not_zero():
    assert mean_loss([1.0, 3.0]) == 2.0
    assert mean_loss([1.0, math.nan, math.inf]) == 1.0
    assert mean_loss([math.nan]) is None


def test_batch_norm_with_dp_is_refused_with_layer_and_alternatives():
    with pytest.raises(UserError) as refused:
        tiny_federation(model={"kind": "resnet9", "width": 4, "norm": "batch"}, privacy=DP)
    message = str(refused.value)
    for part in ("module.conv1.norm", 'norm = "group"', "MONAI", "instance"):
        assert part in message


def test_batch_norm_statistics_are_averaged():
    federation = tiny_federation(model={"kind": "resnet9", "width": 4, "norm": "batch"}, local=PLAIN)
    start = initial_state(federation)
    state = run_round(federation, start)
    alone = [run_round(replace(federation, clients=(client,)), start).buffers_Q for client in federation.clients]
    assert not torch.equal(alone[0], alone[1])
    assert torch.allclose(state.buffers_Q, torch.stack(alone).mean(0), atol=1e-6)


def test_a_batch_of_one_record_that_batch_norm_cannot_take_is_refused():
    # At 8 pixels the last feature map is a single number, of which one record has no variance.
    changes = {
        "model": {"kind": "resnet9", "width": 4, "norm": "batch"},
        "partition": {"kind": "iid", "num_clients": 1},
        "rounds": 1,
    }
    small, large = tiny_dataset(33), tiny_dataset(33, size=16)
    for batch_size in (32, 1):
        local = {"batch_size": batch_size, "epochs": 1}
        with pytest.raises(UserError, match=f"{batch_size} leaves client 1, with 33 records, a batch of a single one"):
            tiny_federation(small, **changes, local=local)
        trained_state(tiny_federation(large, **changes, local=local))  # there each channel has several numbers
    trained_state(tiny_federation(small, **changes, local={"batch_size": 31}))
    trained_state(tiny_federation(small, **changes, local={"batch_size": 32, "steps": 1}))
    group = tiny_federation(small, **{**changes, "model": {"kind": "resnet9", "width": 4}}, local={"batch_size": 1})
    trained_state(group)
    fresh = Resnet9(width=4, norm="batch").make(1, 16, 3, 0)
    looked_at = tiny_federation(large, **changes, local={"batch_size": 32})
    assert torch.equal(initial_state(looked_at).buffers_Q, get_buffers(fresh))  # looking left no trace


def test_local_only_trains_on_one_hospital_alone():
    dataset = tiny_dataset()
    algorithm = {"kind": "local_only", "client": 1}
    federation = tiny_federation(dataset, algorithm=algorithm)
    state = trained_state(federation)
    others = tiny_federation(dataset).clients[0].shards[0].records.names_N
    labels = dataset.train.labels_N.copy()
    labels[np.isin(dataset.train.names_N, others)] = 0
    elsewhere = replace(dataset, train=replace(dataset.train, labels_N=labels))
    assert equal_states(trained_state(tiny_federation(elsewhere, algorithm=algorithm)), state)
    here = replace(dataset, train=replace(dataset.train, labels_N=np.zeros_like(labels)))
    assert not equal_states(trained_state(tiny_federation(here, algorithm=algorithm)), state)


def test_flipped_labels_cost_accuracy():
    dataset = tiny_dataset(240, num_classes=2)
    local = {"batch_size": 16, "epochs": 2, "optimizer": "adam", "learning_rate": 0.01}
    clean, attacked = (
        trained_state(tiny_federation(dataset, local=local, rounds=4, threat=threat)).history[-1]["val_accuracy"]
        for threat in ({"kind": "none"}, {"kind": "label_flip", "num_malicious": 2})
    )
    assert clean > 0.9
    assert attacked < clean - 0.3


def test_the_trained_model_is_the_states():
    federation = tiny_federation()
    state = trained_state(federation)
    model = trained_model(federation, state)
    assert not model.training
    assert torch.equal(get_params(model), state.params_P)


AVERAGED = {
    "federated": {},
    "pooled": {"algorithm": {"kind": "centralised"}},
    "alone": {"algorithm": {"kind": "local_only", "client": 0}},
    "batch norm": {"model": {"kind": "resnet9", "width": 4, "norm": "batch"}},
}


@pytest.mark.parametrize("name", AVERAGED)
def test_the_average_follows_its_formula_and_changes_no_round(name):
    dataset, changes = tiny_dataset(), {**AVERAGED[name], "rounds": 4}
    federation = tiny_federation(dataset, **changes, averaging={"decay": 0.2})
    plain = tiny_federation(dataset, **changes)
    state = other = initial_state(federation)
    expected_P, expected_Q = state.params_P, state.buffers_Q
    assert torch.equal(state.model_P, state.params_P)
    for decay in (1 / 10, 2 / 11, 0.2, 0.2):  # (1 + t) / (10 + t) until it passes 0.2
        state, other = run_round(federation, state), run_round(plain, other)
        expected_P = decay * expected_P + (1 - decay) * state.params_P
        expected_Q = decay * expected_Q + (1 - decay) * state.buffers_Q
        assert torch.equal(state.params_P, other.params_P) and torch.equal(state.buffers_Q, other.buffers_Q)
        assert torch.allclose(state.model_P, expected_P, atol=1e-7)
        assert torch.allclose(state.model_Q, expected_Q, atol=1e-7)
        assert not torch.allclose(state.model_P, state.params_P, atol=1e-5)
        assert torch.equal(other.model_P, other.params_P) and other.average_P is None
    model = trained_model(federation, state)
    assert torch.equal(get_params(model), state.model_P) and torch.equal(get_buffers(model), state.model_Q)
    assert state.history[-1]["val_loss"] == watch(model, dataset.val)["val_loss"]
    assert state.history[-1]["val_loss"] != other.history[-1]["val_loss"]


def test_an_average_that_keeps_nothing_is_none():
    dataset = tiny_dataset()
    federation, plain = tiny_federation(dataset, averaging={"decay": 0}), tiny_federation(dataset)
    state, other = trained_state(federation), trained_state(plain)
    assert torch.equal(state.model_P, other.model_P)
    assert [{**row, "seconds": 0} for row in state.history] == [{**row, "seconds": 0} for row in other.history]
    for decay in (1, -0.1):
        with pytest.raises(ValueError, match="decay"):
            tiny_spec(averaging={"decay": decay})


def test_the_average_costs_no_privacy():
    claims = [
        guarantee(federation, trained_state(federation))
        for federation in (tiny_federation(privacy=DP), tiny_federation(privacy=DP, averaging={"decay": 0.9}))
    ]
    assert claims[0] == claims[1]


def test_a_checkpoint_from_before_there_were_averages_is_read():
    tensors, texts = initial_state(tiny_federation()).pack()
    texts.pop("pretraining_seconds")
    state = TrainingState.unpack(tensors, texts, CPU)
    assert state.average_P is None and state.seconds == 0


def test_private_steps_are_counted_where_they_ran():
    algorithm = {"kind": "fedavg", "clients_per_round": 1}
    federation = tiny_federation(privacy=DP, algorithm=algorithm, rounds=4, local={"batch_size": 8, "steps": 3})
    half, whole = trained_state(federation, 2), trained_state(federation)
    took_part = [row["clients"][0] for row in whole.history]
    claim = guarantee(federation, whole)
    for client in federation.clients:
        (event,) = claim.events_by_client[client.name]
        assert event.steps == 3 * took_part.count(client.name)
        assert event.sampling_rate == 8 / 32
        assert claim.epsilon_by_client[client.name] == epsilon([event], 1e-3)
    assert claim.epsilon == max(claim.epsilon_by_client.values())
    assert sum(guarantee(federation, half).epsilon_by_client.values()) < sum(claim.epsilon_by_client.values())
    assert (claim.delta, claim.clip) == (1e-3, 1.0)
    assert "Opacus" in claim.accountant
    assert any("validation" in phrase for phrase in claim.outside)


def test_half_the_rounds_cost_less():
    federation = tiny_federation(privacy=DP, rounds=2)
    none = initial_state(federation)
    half = run_round(federation, none)
    none, half, whole = (guarantee(federation, s) for s in (none, half, run_round(federation, half)))
    assert none.epsilon == 0
    assert 0 < half.epsilon < whole.epsilon


@pytest.mark.parametrize("algorithm", [{"kind": "fedavg", "clients_per_round": 1}, {"kind": "centralised"}])
def test_a_target_epsilon_is_kept_by_every_client(algorithm):
    privacy = {"kind": "dp_sgd", "epsilon": 4.0, "delta": 1e-3}
    partition = {"kind": "quantity", "num_clients": 2, "sizes": [2, 1]}
    federation = tiny_federation(privacy=privacy, partition=partition, algorithm=algorithm, rounds=3)
    claim = guarantee(federation, trained_state(federation))
    assert claim.epsilon_by_client.keys() == {client.name for client in federation.clients}
    assert 3.9 < claim.epsilon <= 4.0
    assert all(0 < value <= 4.0 for value in claim.epsilon_by_client.values())
    pooled = algorithm["kind"] == "centralised"
    assert claim.trust == ("central" if pooled else "local")
    assert ("pooled in one place" in claim.in_words()) == pooled
    assert ("Each hospital adds its own noise" in claim.in_words()) != pooled


def test_without_dp_nothing_is_claimed():
    federation = tiny_federation()
    assert guarantee(federation, trained_state(federation, 1)) == NO_PRIVACY


def test_private_records_reach_the_model_through_noise_only():
    # With the whole gradient clipped away, the trained model does not depend on the records at all.
    privacy = {**DP, "clip": 1e-20}
    dataset = tiny_dataset()
    dark = replace(dataset, train=replace(dataset.train, images_NCHW=np.zeros_like(dataset.train.images_NCHW)))
    one, other = (trained_state(tiny_federation(data, privacy=privacy)) for data in (dataset, dark))
    assert torch.allclose(one.params_P, other.params_P, atol=1e-12)


def test_an_equal_seed_gives_an_equal_start():
    assert torch.equal(initial_state(tiny_federation()).params_P, get_params(Resnet9(width=4).make(1, 8, 3, 0)))


def test_a_round_poisons_all_that_its_steps_see_and_nothing_else():
    threat = {"kind": "adversarial_samples", "num_malicious": 1, "share": 1.0, "radius": "8/255", "steps": 1}
    federation = tiny_federation(privacy=DP, threat=threat, local={"batch_size": 8, "steps": 2})
    spec, client = federation.spec, federation.clients[-1]
    seen = {int(unit) for step in batches(spec, client, client.num_records, 1) for unit in step}
    records = client.training_records(spec, federation.classifier, 1, drawn_records(spec, client, 1))
    changed = set(np.flatnonzero((records.images_NCHW != client.shards[0].records.images_NCHW).any((1, 2, 3))))
    assert 0 < len(seen) < client.num_records
    # PGD keeps the image itself where no step found a worse one, which is rare.
    assert changed <= seen and len(seen - changed) <= 1
    first_step = {int(unit) for unit in next(batches(spec, client, client.num_records, 1))}
    assert len(seen - first_step) > 1


def test_training_in_bfloat16_is_training_with_fewer_digits():
    states = []
    for precision in ("float32", "bfloat16"):
        federation = tiny_federation(local={"batch_size": 8, "precision": precision}, rounds=2)
        states.append(trained_state(federation).params_P)
        assert federation.classifier._computes_in == torch.float32
    exact_P, rough_P = states
    update_P = exact_P - initial_state(tiny_federation()).params_P
    assert 1e-5 < float((rough_P - exact_P).norm() / update_P.norm()) < 0.3


def test_privacy_costs_the_same_in_bfloat16():
    claims = []
    for precision in ("float32", "bfloat16"):
        federation = tiny_federation(privacy=DP, local={"batch_size": 8, "precision": precision}, rounds=1)
        state = trained_state(federation)
        assert state.params_P.isfinite().all()
        claims.append(guarantee(federation, state))
    assert claims[0] == claims[1]


def test_a_round_says_what_it_draws():
    private, plain = tiny_federation(privacy=DP), tiny_federation()
    assert drawn_records(plain.spec, plain.clients[0], 0) is None
    drawn = drawn_records(private.spec, private.clients[0], 0)
    seen = [position for batch in batches(private.spec, private.clients[0], 32, 0) for position in batch]
    assert drawn.tolist() == sorted(set(seen))
