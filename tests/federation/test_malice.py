"""Malicious clients in a real round: who changes what, what they may know, and what survives a kill."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from helpers.tiny_federation import DP, equal_states, tiny_dataset, tiny_federation, tiny_spec, trained_state
from trilemma.errors import UserError
from trilemma.federation import round as federated_round
from trilemma.federation.local_training import LocalResult
from trilemma.federation.malice import forged
from trilemma.federation.round import run_round
from trilemma.federation.state import TrainingState
from trilemma.federation.training import guarantee, initial_state

FIVE = {"partition": {"kind": "iid", "num_clients": 5}, "local": {"batch_size": 8, "steps": 1}, "rounds": 3}
ON_UPDATES = [
    {"kind": "sign_flip"},
    {"kind": "gaussian"},
    {"kind": "scaling"},
    {"kind": "alie", "z": 1.5},
    {"kind": "inner_product"},
    {"kind": "min_max"},
    {"kind": "min_sum"},
    {"kind": "mimic"},
    {"kind": "adaptive"},
    {"kind": "label_flip", "boost": 5.0},
    {"kind": "backdoor", "boost": "replace", "target": 1},
    *({"kind": "malformed", "flaw": flaw} for flaw in ("nan", "infinity", "shape", "huge", "replay")),
]
every_threat = pytest.mark.parametrize("threat", ON_UPDATES, ids=lambda t: "-".join(map(str, t.values())))


def seen_by_server(monkeypatch, federation, state=None):
    """What the server is handed in a round, and the state after it."""
    handed = {}
    aggregate = federated_round.aggregate

    def watched(federation, chosen, results, *rest):
        handed.update(results)
        return aggregate(federation, chosen, results, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(federated_round, "aggregate", watched)
        after = run_round(federation, state or initial_state(federation))
    return handed, after


@every_threat
def test_only_malicious_clients_send_something_else(threat, monkeypatch):
    fields = {**FIVE, "threat": {**threat, "clients": [1, 3]}}
    attacked, _ = seen_by_server(monkeypatch, tiny_federation(**fields))
    honest, _ = seen_by_server(monkeypatch, tiny_federation(**FIVE))
    differs = {
        name
        for name, result in honest.items()
        if attacked[name].update_P.shape != result.update_P.shape
        or not torch.equal(attacked[name].update_P, result.update_P)
    }
    if threat.get("flaw") == "replay":  # of which the first round is the model for the others
        assert not differs
    else:
        assert differs == {"client 2", "client 4"}
    for name in ("client 1", "client 3", "client 5"):
        assert torch.equal(attacked[name].buffers_Q, honest[name].buffers_Q)


@every_threat
@pytest.mark.parametrize("rule", [{"kind": "mean"}, {"kind": "median"}], ids=["mean", "median"])
def test_trains_to_the_end_and_goes_on_where_it_was_killed(threat, rule):
    fields = {**FIVE, "aggregation": rule, "threat": {**threat, "num_malicious": 2}}
    whole = trained_state(tiny_federation(**fields))
    assert whole.params_P.isfinite().all() and len(whole.history) == 3
    federation = tiny_federation(**fields)
    tensors, texts = trained_state(federation, 1).pack()
    again = trained_state(federation, state=TrainingState.unpack(tensors, texts, torch.device("cpu")))
    assert equal_states(whole, again)


def test_in_rounds_in_which_they_do_not_act_they_are_honest(monkeypatch):
    fields = {**FIVE, "threat": {"kind": "scaling", "num_malicious": 2, "when": {"first": 2, "last": 2}}}
    federation, plain = tiny_federation(**fields), tiny_federation(**FIVE)
    first, after = seen_by_server(monkeypatch, federation)
    honest, plain_after = seen_by_server(monkeypatch, plain)
    assert all(torch.equal(first[name].update_P, honest[name].update_P) for name in honest)
    assert torch.equal(after.params_P, plain_after.params_P)
    second, _ = seen_by_server(monkeypatch, federation, after)
    honest, _ = seen_by_server(monkeypatch, plain, plain_after)
    assert not torch.equal(second["client 5"].update_P, honest["client 5"].update_P)
    poisoned = {**FIVE, "threat": {"kind": "label_flip", "num_malicious": 2, "when": {"first": 2}}}
    first, _ = seen_by_server(monkeypatch, tiny_federation(**poisoned))
    honest, _ = seen_by_server(monkeypatch, tiny_federation(**FIVE))
    assert all(torch.equal(first[name].update_P, honest[name].update_P) for name in honest)


def test_model_replacement_leaves_the_attackers_model(monkeypatch):
    """Where the honest have nothing to say, the mean is what the attackers' own training made."""
    fields = {**FIVE, "threat": {"kind": "label_flip", "num_malicious": 2, "boost": "replace"}}
    federation = tiny_federation(**fields)
    state, own = initial_state(federation), {}
    honest = federated_round.local_train

    def train(spec, client, *rest):
        result = honest(spec, client, *rest)
        if not client.malicious:
            return result._replace(update_P=torch.zeros_like(result.update_P))
        own[client.name] = result.update_P
        return result

    monkeypatch.setattr(federated_round, "local_train", train)
    moved = run_round(federation, state).params_P - state.params_P
    torch.testing.assert_close(moved, (own["client 4"] + own["client 5"]) / 2, rtol=1e-4, atol=1e-6)


def test_where_no_malicious_client_takes_part_nothing_is_forged():
    federation = tiny_federation(**FIVE, threat={"kind": "scaling", "clients": [0]})
    state = initial_state(federation)
    results = {client.name: None for client in federation.clients[1:]}
    assert forged(federation, list(federation.clients[1:]), results, state) == (results, {})


def test_a_trusted_servers_clip_is_known_to_who_adapts():
    privacy = {**DP, "unit": "client", "trust": "central", "clip": 0.05}
    local = {"batch_size": 4, "steps": 1, "momentum": 0, "learning_rate": 0.5}
    federation = tiny_federation(
        partition={"kind": "iid", "num_clients": 8},
        local=local,
        privacy=privacy,
        threat={"kind": "adaptive", "num_malicious": 2, "knows": "own"},
    )
    state = trained_state(federation)
    assert state.params_P.isfinite().all()


CENTRAL = {
    "partition": {"kind": "iid", "num_clients": 8},
    "privacy": {**DP, "unit": "client", "trust": "central", "clip": 0.05},
    "local": {"batch_size": 4, "steps": 1, "momentum": 0, "learning_rate": 0.5},
}


@pytest.mark.parametrize(
    "threat",
    [
        {"kind": "label_flip", "boost": "replace", "num_malicious": 2},
        {"kind": "alie", "knows": "own", "num_malicious": 4},
        {"kind": "adaptive", "knows": "own", "num_malicious": 2},
        {"kind": "inner_product", "knows": "own", "num_malicious": 2},
        {"kind": "min_max", "knows": "own", "num_malicious": 2},
        {"kind": "sign_flip", "num_malicious": 2},
    ],
    ids=lambda threat: threat["kind"],
)
def test_where_it_is_secret_who_takes_part_what_attackers_send_does_not_tell(threat):
    federation = tiny_federation(**CENTRAL, threat=threat)
    state, draws = initial_state(federation), torch.Generator().manual_seed(0)
    rows = torch.randn(8, len(state.params_P), generator=draws) / 1000
    clients = list(federation.clients)
    results = {
        client.name: LocalResult(row_P, state.buffers_Q, 0.0, {}) for client, row_P in zip(clients, rows, strict=True)
    }
    sent = []
    for chosen in (clients, clients[1:], clients[3:]):
        taking_part = {client.name: results[client.name] for client in chosen}
        sent.append(forged(federation, chosen, taking_part, state)[0][clients[-1].name].update_P)
    assert not torch.equal(sent[0], rows[-1])
    assert torch.equal(sent[0], sent[1]) and torch.equal(sent[0], sent[2])


def test_in_a_secure_sum_attackers_do_not_learn_whose_update_is_long():
    threat = {"kind": "alie", "knows": "own", "num_malicious": 2}
    privacy = {**DP, "trust": "distributed", "num_colluding": 2}
    federation = tiny_federation(**{**CENTRAL, "privacy": privacy}, threat=threat)
    state, draws = initial_state(federation), torch.Generator().manual_seed(0)
    rows = torch.randn(8, len(state.params_P), generator=draws) / 1000
    sent = []
    for factor in (1.0, 1e9):
        results = {
            client.name: LocalResult(row_P * (factor if i == 0 else 1.0), state.buffers_Q, 0.0, {})
            for i, (client, row_P) in enumerate(zip(federation.clients, rows, strict=True))
        }
        sent.append(forged(federation, list(federation.clients), results, state)[0]["client 8"].update_P)
    assert torch.equal(sent[0], sent[1])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"algorithm": {"kind": "centralised"}, "threat": {"kind": "alie"}}, "sends no updates"),
        ({"algorithm": {"kind": "local_only"}, "threat": {"kind": "label_flip", "boost": 2.0}}, "sends no updates"),
        ({"threat": {"kind": "inflated_count"}}, "needs algorithm.weights = 'records'"),
        (
            {
                "privacy": {**DP, "trust": "distributed", "num_colluding": 1},
                "local": {"steps": 1, "batch_size": 4, "momentum": 0},
                "threat": {"kind": "alie"},
            },
            "a secure sum shows single updates to nobody else",
        ),
        (
            {
                "privacy": {**DP, "trust": "distributed"},
                "local": {"steps": 1, "batch_size": 4, "momentum": 0},
                "threat": {"kind": "sign_flip"},
            },
            "set privacy.num_colluding = 1 or more",
        ),
        ({"threat": {"kind": "label_flip", "when": {"first": 3}}}, "after the last of 2 rounds"),
        ({"threat": {"kind": "min_max", "knows": "own"}}, "one update has no spread"),
        (
            {
                "privacy": {**DP, "unit": "client", "trust": "central"},
                "partition": {"kind": "iid", "num_clients": 8},
                "threat": {"kind": "mimic"},
            },
            "a server that adds the noise shows single updates",
        ),
    ],
)
def test_threats_that_cannot_be_are_refused_with_the_way_out(fields, said):
    fields["threat"]["num_malicious"] = 1
    with pytest.raises(ValidationError, match=said):
        tiny_spec(**fields)


@pytest.mark.parametrize(
    "threat", [{"kind": "label_flip", "source": 2}, {"kind": "backdoor", "target": 2, "clean_label": True}]
)
def test_attackers_without_a_record_that_they_could_change_are_refused(threat):
    dataset = tiny_dataset()
    labels_N = np.where(dataset.train.labels_N == 2, 0, dataset.train.labels_N)
    without = replace(dataset, train=replace(dataset.train, labels_N=labels_N))
    tiny_federation(dataset, threat={**threat, "num_malicious": 1})
    with pytest.raises(UserError, match="they hold no record that it would change"):
        tiny_federation(without, threat={**threat, "num_malicious": 1})


def test_a_class_that_is_not_there_and_a_trigger_without_room_are_refused_before_training():
    for threat in (
        {"kind": "backdoor", "target": 3},
        {"kind": "backdoor", "trigger": {"kind": "patch", "size": 20}},
        {"kind": "label_flip", "mode": "targeted", "target": 9},
    ):
        with pytest.raises(UserError, match="threat"):
            tiny_federation(tiny_dataset(), threat={**threat, "num_malicious": 1})


def test_shares_of_noise_that_malicious_hospitals_leave_out_are_spare():
    privacy = {**DP, "trust": "distributed", "num_colluding": 1}
    local = {"batch_size": 4, "steps": 1, "momentum": 0}
    federation = tiny_federation(privacy=privacy, local=local, threat={"kind": "scaling", "num_malicious": 1})
    claim = guarantee(federation, trained_state(federation))
    assert federation.clients[0].plan.num_honest == 2
    assert set(claim.epsilon_by_client) == {"client 1", "client 2"}


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "mean"},
        {"kind": "trimmed_mean", "num_byzantine": 2},
        {"kind": "bulyan", "num_byzantine": 1},
        {"kind": "multi_krum", "num_byzantine": 2},
        {"kind": "median", "before": {"kind": "nearest_neighbours", "num_byzantine": 2}},
        {"kind": "foolsgold"},
    ],
    ids=lambda rule: rule["kind"],
)
@pytest.mark.parametrize(("knows", "num_malicious"), [("own", 1), ("own", 2), ("honest", 2), ("honest", 7)])
def test_who_adapts_is_let_in_whatever_it_knows(rule, knows, num_malicious, monkeypatch):
    """A rehearsal has as many rows as the round, and knows what the server leaves out.

    To be left out pays only where too few are left for the rule, so that nothing is learnt.
    """
    fields = {"partition": {"kind": "iid", "num_clients": 7}, "local": {"batch_size": 8, "steps": 1}, "rounds": 2}
    fields["local"]["learning_rate"] = 3.0  # updates about as long as the parameters
    threat = {"kind": "adaptive", "num_malicious": num_malicious, "knows": knows}
    federation = tiny_federation(**fields, aggregation=rule, threat=threat)
    history = trained_state(federation).history
    assert all("left_out" not in row or "refused" in row for row in history)
    assert rule["kind"] in ("bulyan", "multi_krum") or all("refused" not in row for row in history)


def test_an_honest_client_that_diverged_is_nobodys_evidence(monkeypatch):
    honest = federated_round.local_train

    def train(spec, client, *rest):
        result = honest(spec, client, *rest)
        return result._replace(update_P=result.update_P * float("nan")) if client.number == 0 else result

    monkeypatch.setattr(federated_round, "local_train", train)
    for threat in ({"kind": "mimic"}, {"kind": "adaptive"}, {"kind": "alie", "z": 1.0}):
        state = trained_state(tiny_federation(**FIVE, threat={**threat, "num_malicious": 2}), 1)
        assert set(state.history[0]["left_out"]) == {"client 1"} and state.params_P.isfinite().all()


@pytest.mark.parametrize("rule", [{"kind": "mean"}, {"kind": "divide_and_conquer", "num_byzantine": 1}])
def test_an_attacker_that_diverged_breaks_no_rehearsal(monkeypatch, rule):
    honest = federated_round.local_train

    def train(spec, client, *rest):
        result = honest(spec, client, *rest)
        return result._replace(update_P=result.update_P * float("nan")) if client.number == 4 else result

    monkeypatch.setattr(federated_round, "local_train", train)
    threat = {"kind": "adaptive", "knows": "own", "num_malicious": 2}
    state = trained_state(tiny_federation(**FIVE, threat=threat, aggregation=rule), 1)
    assert set(state.history[0]["left_out"]) == {"client 4", "client 5"} and state.params_P.isfinite().all()


def test_model_replacement_counts_the_servers_learning_rate():
    fields = {**FIVE, "threat": {"kind": "label_flip", "num_malicious": 2, "boost": "replace"}}
    federation = tiny_federation(**fields, server={"kind": "sgd", "learning_rate": 0.5})
    state = initial_state(federation)
    results = {
        client.name: LocalResult(torch.ones_like(state.params_P), state.buffers_Q, 0.0, {})
        for client in federation.clients
    }
    sent, _ = forged(federation, list(federation.clients), results, state)
    assert float(sent["client 5"].update_P[0]) == pytest.approx(1 / (0.4 * 0.5))


def test_a_hospital_that_lies_about_its_records_weighs_more_only_where_records_weigh():
    by_records = {"algorithm": {"kind": "fedavg", "weights": "records"}}
    lies = {"threat": {"kind": "inflated_count", "num_malicious": 1, "factor": 50.0}}
    told = [client.weight for client in tiny_federation(**by_records, **lies).clients]
    assert told == [32.0, 32.0, 1600.0]
    assert [client.weight for client in tiny_federation(**by_records).clients] == [32.0, 32.0, 32.0]
