import numpy as np
import pytest
import torch
from pydantic import ValidationError

from helpers.tiny_federation import DP, tiny_dataset, tiny_federation, tiny_spec
from trilemma.errors import UserError
from trilemma.federation.clients import participants
from trilemma.federation.training import planned_events
from trilemma.privacy.accounting import epsilon


def test_each_hospital_trains_on_its_own_records():
    dataset = tiny_dataset()
    federation = tiny_federation(dataset)
    assert [client.name for client in federation.clients] == ["client 1", "client 2", "client 3"]
    names = [set(client.shards[0].records.names_N) for client in federation.clients]
    assert sum(len(n) for n in names) == len(dataset.train) == len(set.union(*names))


def test_centralised_sees_all_and_local_only_one():
    dataset = tiny_dataset()
    (everyone,) = tiny_federation(dataset, algorithm={"kind": "centralised"}).clients
    assert everyone.num_records == len(dataset.train)
    assert len(everyone.training_records(tiny_spec(), None, 0)) == len(dataset.train)
    federation = tiny_federation(dataset)
    (alone,) = tiny_federation(dataset, algorithm={"kind": "local_only", "client": 1}).clients
    assert alone.name == "client 2"
    assert np.array_equal(alone.shards[0].records.names_N, federation.clients[1].shards[0].records.names_N)


@pytest.mark.parametrize(
    ("weights", "expected"), [("equal", [1, 1, 1]), ([1.0, 2.0, 5.0], [1, 2, 5]), ("records", [48, 36, 12])]
)
def test_weights(weights, expected):
    partition = {"kind": "quantity", "num_clients": 3, "sizes": [4, 3, 1]}
    federation = tiny_federation(partition=partition, algorithm={"kind": "fedavg", "weights": weights})
    assert [client.weight for client in federation.clients] == pytest.approx(expected)


def test_participants_are_drawn_by_seed_and_round_alone():
    spec = tiny_spec(partition={"kind": "iid", "num_clients": 5}, algorithm={"kind": "fedavg", "clients_per_round": 2})
    drawn = [participants(spec, 5, index) for index in range(60)]
    assert drawn == [participants(spec, 5, index) for index in range(60)]
    assert all(len(set(who)) == 2 and list(who) == sorted(who) for who in drawn)
    assert len(set(drawn)) > 5
    counts = np.bincount(np.concatenate(drawn), minlength=5)
    assert counts.min() > 10
    other = spec.model_copy(update={"seed": 1})
    assert drawn != [participants(other, 5, index) for index in range(60)]
    assert participants(tiny_spec(), 3, 0) == (0, 1, 2)
    assert participants(tiny_spec(algorithm={"kind": "centralised"}), 1, 0) == (0,)


@pytest.mark.parametrize("algorithm", [{"kind": "fedavg"}, {"kind": "centralised"}])
def test_only_malicious_records_change(algorithm):
    threat = {"kind": "label_flip", "clients": [1]}
    federation = tiny_federation(algorithm=algorithm, threat=threat)
    clean = np.concatenate([s.records.labels_N for c in federation.clients for s in c.shards])
    hospital = np.concatenate([np.full(len(s.records), s.hospital) for c in federation.clients for s in c.shards])
    for _ in range(2):  # round after round the same records lie
        poisoned = [c.training_records(federation.spec, federation.classifier, 0) for c in federation.clients]
        changed = np.concatenate([records.labels_N for records in poisoned]) != clean
        assert np.array_equal(changed, hospital == 1)


@pytest.mark.parametrize(
    ("drawn", "trust"),
    [
        (2, {"trust": "local"}),
        (2, {"trust": "distributed"}),
        (3, {"trust": "distributed", "num_colluding": 1}),
        (3, {"trust": "distributed", "num_colluding": 2, "unit": "patient"}),
    ],
)
def test_where_only_some_take_part_everyone_keeps_to_the_target(drawn, trust):
    federation = tiny_federation(
        privacy={"kind": "dp_sgd", "epsilon": 0.5, "delta": 1e-3, **trust},
        partition={"kind": "iid", "num_clients": 4},
        algorithm={"kind": "fedavg", "clients_per_round": drawn},
        local={"batch_size": 10 if "unit" in trust else 20, "steps": 1, "momentum": 0},  # of 12 or 24
        rounds=4,
    )
    events = [of_one for of_one in planned_events(federation).values() if of_one[0].steps]
    costs = [epsilon(of_one, 1e-3) for of_one in events]
    steps = [of_one[0].steps for of_one in events]
    assert sum(steps) == 4 * drawn and min(steps) < max(steps)
    assert 0.49 < max(costs) <= 0.5
    if trust["trust"] == "local":
        assert min(costs) > 0.49  # each has noise of its own
        return
    deviations = []

    def note(sum_P, deviation):
        deviations.append(deviation)
        return sum_P

    for client in federation.clients[: drawn - trust.get("num_colluding", 0)]:
        client.plan.noised_mean(torch.zeros(1), note)
    together = sum(deviation**2 for deviation in deviations) ** 0.5  # of a round's honest participants
    assert together == pytest.approx(events[0][0].noise_multiplier)


def test_what_cannot_be_is_refused_with_the_clients_name():
    with pytest.raises(UserError, match=r"client 'client 1': local.batch_size 64 exceeds its 32 records"):
        tiny_federation(privacy=DP, local={"batch_size": 64})
    with pytest.raises(UserError, match="not below 1 / 32 records"):
        tiny_federation(privacy={**DP, "delta": 0.05})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": {"kind": "local_only", "client": 3}}, "client 3 is not one of the 3 clients"),
        ({"algorithm": {"kind": "fedavg", "clients_per_round": 4}}, "clients_per_round 4 exceeds the 3 clients"),
        ({"algorithm": {"kind": "fedavg", "weights": [1, 2]}}, "2 numbers for 3 clients"),
        ({"algorithm": {"kind": "fedavg", "weights": [1, 2, 0]}}, "greater than or equal to"),
        ({"algorithm": {"kind": "fedavg", "weights": [1e39, 1, 1]}}, "less than or equal to"),
        ({"algorithm": {"kind": "fedprox", "weights": "records"}, "privacy": DP}, "under DP use 'equal'"),
        ({"threat": {"kind": "label_flip", "num_malicious": 4}}, "more than the 3 clients"),
        ({"local": {"epochs": 1, "steps": 1}}, "either epochs or steps"),
        ({"local": {"momentum": 1.0}}, "less than 1"),
        ({"rounds": 0}, "greater than or equal to 1"),
        ({"algorithm": {"kind": "krum"}}, "krum"),
        ({"algorithm": {"kind": "centralised", "weights": "equal"}}, "Extra inputs"),
    ],
)
def test_impossible_trainings_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        tiny_spec(**changes)


def test_each_malicious_client_draws_its_own_records():
    federation = tiny_federation(threat={"kind": "label_flip", "num_malicious": 2, "share": 0.5})
    changed = []
    for client in federation.clients:
        poisoned = client.training_records(federation.spec, federation.classifier, 0)
        changed.append(poisoned.labels_N != client.shards[0].records.labels_N)
    assert [int(mask.sum()) for mask in changed] == [0, 16, 16]
    assert not np.array_equal(changed[1], changed[2])
