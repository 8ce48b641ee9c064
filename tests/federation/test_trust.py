"""Units and trust: what is sampled, clipped and noised by whom, and that nothing else reaches the model."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torch import nn

from helpers.tiny_federation import CPU, DP, equal_states, tiny_dataset, tiny_federation, tiny_spec, trained_state
from trilemma.attacks.poisoning.selection import choose_records
from trilemma.errors import UserError
from trilemma.federation import local_training
from trilemma.federation import round as federated_round
from trilemma.federation.aggregation.specs import Median
from trilemma.federation.refusals import why_unsound
from trilemma.federation.round import run_round, who_takes_part
from trilemma.federation.state import EVERYBODY, TrainingState
from trilemma.federation.training import guarantee, initial_state, planned_events
from trilemma.models.classifier import Classifier
from trilemma.privacy.accounting import epsilon
from trilemma.privacy.clipping_rules import Flat, PerLayer
from trilemma.privacy.guarantee import DpEvent, group_in_words
from trilemma.privacy.specs import DpSgd

INFINITY = float("inf")
STEP = {"batch_size": 16, "steps": 1, "momentum": 0, "learning_rate": 0.5}
DISTRIBUTED = {**DP, "trust": "distributed"}
PATIENT = {**DP, "unit": "patient"}
CLIENT = {**DP, "unit": "client", "trust": "central"}
EIGHT = {"partition": {"kind": "iid", "num_clients": 8}, "local": {**STEP, "batch_size": 4}}


def public_stream(spec, client, role, round_index):
    """As of a training without privacy: the same draws for both that are compared."""
    return spec.seed, role, round_index, client.number


def opened(federation, clipper, **changes):
    """The federation with every unit in every step, no clipping and no noise."""

    def open_plan(plan):
        return plan and replace(
            plan, sampling_rate=1.0, denominator=float(plan.num_units), clipper=clipper, noise_multiplier=0.0, **changes
        )

    clients = tuple(replace(client, plan=open_plan(client.plan)) for client in federation.clients)
    return replace(federation, clients=clients, plan=open_plan(federation.plan))


@pytest.mark.parametrize("clipper", [Flat(INFINITY), PerLayer(INFINITY)], ids=["flat", "per layer"])
@pytest.mark.parametrize("privacy", [DP, PATIENT, DISTRIBUTED, {**PATIENT, "trust": "distributed"}, CLIENT])
@pytest.mark.parametrize("defence", [{"kind": "none"}, {"kind": "fgsm", "radius": "4/255"}])
def test_no_clipping_and_no_noise_is_plain_sgd_on_the_same_batches(privacy, clipper, defence, monkeypatch):
    # Full batches in the order of the records, so that augmentation and attacks draw the same for each.
    # Every patient of this data has two images.
    monkeypatch.setattr(local_training, "batches", lambda spec, client, *_: iter([list(range(client.num_units))]))
    monkeypatch.setattr(local_training, "client_stream", public_stream)
    dataset = tiny_dataset()
    fields = {"local": {**STEP, "batch_size": 32, "augmentation": {"shift": 1}}, "defence": defence}
    plain = trained_state(tiny_federation(dataset, **fields))
    narrow = {**fields, "local": {**fields["local"], "batch_size": 16}} if privacy.get("unit") == "patient" else fields
    state = trained_state(opened(tiny_federation(dataset, privacy=privacy, **narrow), clipper))
    moved = float((plain.params_P - initial_state(tiny_federation(dataset)).params_P).norm())
    assert moved > 0.05
    assert float((state.params_P - plain.params_P).norm()) < 1e-3 * moved
    clipped = trained_state(opened(tiny_federation(dataset, privacy=privacy, **narrow), Flat(0.001)))
    assert float((clipped.params_P - plain.params_P).norm()) > 0.1 * moved


@pytest.mark.parametrize("privacy", [DP, PATIENT, DISTRIBUTED], ids=["example", "patient", "distributed"])
def test_with_copies_too_no_clipping_and_no_noise_is_plain_sgd(privacy, monkeypatch):
    monkeypatch.setattr(local_training, "batches", lambda spec, client, *_: iter([list(range(client.num_units))]))
    monkeypatch.setattr(local_training, "client_stream", public_stream)
    dataset, augmentation = tiny_dataset(), {"shift": 1, "flip": True, "multiplicity": 3}
    fields = {"local": {**STEP, "batch_size": 16, "augmentation": augmentation}, "defence": {"kind": "fgsm"}}
    plain = trained_state(tiny_federation(dataset, **fields))
    state = trained_state(opened(tiny_federation(dataset, privacy=privacy, **fields), Flat(INFINITY)))
    moved = float((plain.params_P - initial_state(tiny_federation(dataset)).params_P).norm())
    assert float((state.params_P - plain.params_P).norm()) < 1e-3 * moved
    fields["local"] = {**fields["local"], "augmentation": {"shift": 1, "flip": True}}
    once = trained_state(tiny_federation(dataset, **fields))
    assert float((once.params_P - plain.params_P).norm()) > 0.01 * moved


def test_copies_cost_no_privacy():
    (one, other) = (
        planned_events(tiny_federation(privacy=DP, local={**STEP, "augmentation": augmentation}))
        for augmentation in ({"shift": 1}, {"shift": 1, "multiplicity": 8})
    )
    assert one == other


def test_patients_and_not_images_are_sampled_and_counted():
    dataset = tiny_dataset()
    federation = tiny_federation(dataset, privacy=PATIENT, local={"batch_size": 4, "epochs": 1})
    for client in federation.clients:
        assert (client.num_records, client.num_units, client.plan.num_units) == (32, 16, 16)
        assert client.plan.sampling_rate == 4 / 16 and client.steps == 4
        index, sizes = client.records_of([0, 3, 5])
        codes = client.shards[0].records.patients_N
        assert sizes == [2, 2, 2] and len(set(codes[index])) == 3
        assert all(codes[index[2 * i]] == codes[index[2 * i + 1]] for i in range(3))
        assert sorted(client.records_of(list(range(16)))[0]) == list(range(32))
    claim = guarantee(federation, trained_state(federation))
    assert claim.unit == "patient" and claim.events_by_client["client 1"][0].sampling_rate == 0.25


def test_a_pooled_patient_is_one_unit():
    (client,) = tiny_federation(privacy=PATIENT, algorithm={"kind": "centralised"}).clients
    assert client.num_units == 48


def test_unknown_patients_are_refused_under_that_unit_only():
    dataset = tiny_dataset()
    codes = dataset.train.patients_N.copy()
    codes[5] = -1
    blurred = replace(dataset, train=replace(dataset.train, patients_N=codes))
    tiny_federation(blurred, privacy=DP)
    with pytest.raises(UserError, match="stripes does not say so of 1 of its 96 training images.*column 'patient'"):
        tiny_federation(blurred, privacy=PATIENT)


def noise_of_a_round(federation) -> np.ndarray:
    """What a round adds to the model in which nobody was sampled."""
    clients = tuple(
        replace(client, plan=client.plan and replace(client.plan, sampling_rate=1e-12)) for client in federation.clients
    )
    federation = replace(
        federation, clients=clients, plan=federation.plan and replace(federation.plan, sampling_rate=0)
    )
    start = initial_state(federation)
    state = run_round(federation, start)
    return (state.params_P - start.params_P).numpy()


def accepts(noise: np.ndarray, sigma: float) -> bool:
    p_value = stats.kstest(noise, "norm", args=(0, sigma)).pvalue
    assert p_value > 0.01 or p_value < 1e-6
    return p_value > 0.01


@pytest.mark.parametrize("num_colluding", [0, 3, 7])
def test_the_honest_shares_alone_have_the_stated_noise(num_colluding, monkeypatch):
    privacy = {**DISTRIBUTED, "noise_multiplier": 1.4, "clip": 0.5, "num_colluding": num_colluding}
    federation = tiny_federation(privacy=privacy, **EIGHT)
    sums, honest = {}, federated_round.local_train

    def train(spec, client, *rest):
        result = honest(spec, client, *rest)
        sums[client.name] = result.update_P.numpy() * 4 / -0.5  # batch size over learning rate: back to the sum
        return result

    monkeypatch.setattr(federated_round, "local_train", train)
    total = noise_of_a_round(federation) * 8 * 4 / -0.5
    assert np.allclose(total, sum(sums.values()), atol=1e-4)
    sigma = 1.4 * 0.5
    rest = list(sums)[num_colluding:]  # the others withhold theirs, or subtract what they know
    assert accepts(sum(sums[name] for name in rest), sigma)
    assert not accepts(sum(sums[name] for name in rest), sigma * 2 / 3)
    assert not accepts(sum(sums[name] for name in rest), sigma * 3 / 2)
    assert accepts(total, sigma * math.sqrt(8 / (8 - num_colluding)))
    if num_colluding < 7:
        assert np.std(sum(sums[name] for name in rest[1:])) < 0.97 * sigma  # one more colluder is one too many


def test_a_trusted_servers_noise_is_what_is_accounted():
    privacy = {**CLIENT, "noise_multiplier": 1.4, "clip": 0.5}
    federation = tiny_federation(privacy=privacy, **EIGHT)
    noise = noise_of_a_round(federation) * 8
    assert accepts(noise, 0.7) and not accepts(noise, 0.7 * 2 / 3) and not accepts(noise, 0.7 * 3 / 2)


def test_a_round_without_anybody_is_noise_and_counted():
    federation = tiny_federation(privacy=CLIENT, algorithm={"kind": "fedavg", "clients_per_round": 1}, rounds=12)
    state = trained_state(federation)
    assert [] in [who_takes_part(federation, index) for index in range(12)]
    assert state.params_P.isfinite().all()
    assert state.private_steps == dict.fromkeys(("client 1", "client 2", "client 3"), 12)
    json.dumps(state.history, allow_nan=False)


def p_value_of_binomial_sizes(sizes: list[int], num: int, rate: float) -> float:
    counts = np.bincount(sizes, minlength=num + 1)
    return float(stats.chisquare(counts, stats.binom.pmf(range(num + 1), num, rate) * len(sizes)).pvalue)


def test_a_trusted_server_samples_clients_poisson():
    changes = {**EIGHT, "algorithm": {"kind": "fedavg", "clients_per_round": 3}}
    private = tiny_federation(privacy=CLIENT, **changes)
    drawn = [[client.number for client in who_takes_part(private, index)] for index in range(1500)]
    assert p_value_of_binomial_sizes([len(who) for who in drawn], 8, 3 / 8) > 0.01
    assert p_value_of_binomial_sizes([len(who) for who in drawn], 8, 4 / 8) < 1e-6
    joined = np.array([[number in who for number in range(8)] for who in drawn])
    pairs = [stats.chi2_contingency(np.histogram2d(joined[:, i], joined[:, i + 1], bins=2)[0]) for i in range(0, 8, 2)]
    assert min(pair.pvalue for pair in pairs) > 0.001
    plain = tiny_federation(**changes)  # which draws three, no more and no fewer
    assert p_value_of_binomial_sizes([len(who_takes_part(plain, i)) for i in range(300)], 8, 3 / 8) < 1e-6
    other = tiny_federation(privacy={**CLIENT, "clip": 2.0}, **changes)
    assert drawn[:50] != [[client.number for client in who_takes_part(other, index)] for index in range(50)]


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_no_client_moves_a_trusted_servers_model_by_more_than_the_clip(size, monkeypatch):
    federation = tiny_federation(privacy={**CLIENT, "clip": 0.1}, **EIGHT)
    federation = replace(federation, plan=replace(federation.plan, noise_multiplier=1e-9))
    honest = federated_round.local_train

    def train(spec, client, *rest):
        result = honest(spec, client, *rest)
        return result._replace(update_P=result.update_P * size) if client.number == 2 else result

    monkeypatch.setattr(federated_round, "local_train", train)
    start = initial_state(federation)
    whole = run_round(federation, start).params_P
    everybody = federated_round.who_takes_part
    monkeypatch.setattr(federated_round, "who_takes_part", lambda *a: [c for c in everybody(*a) if c.number != 2])
    moved = float((whole - run_round(federation, start).params_P).norm()) * 8
    assert moved <= 0.1 * 1.001
    assert moved > 0.05


def with_nan(result):
    update_P = result.update_P.clone()
    update_P[0] = math.nan
    return result._replace(update_P=update_P)


@pytest.mark.parametrize("privacy", [DISTRIBUTED, CLIENT])
def test_a_malformed_update(privacy, monkeypatch):
    federation = tiny_federation(privacy=privacy, local=STEP)
    start, honest = initial_state(federation), federated_round.local_train

    def train(spec, client, *rest):
        result = honest(spec, client, *rest)
        return with_nan(result) if client.number == 1 else result

    monkeypatch.setattr(federated_round, "local_train", train)
    state = run_round(federation, start)
    (row,) = state.history
    assert state.private_steps == dict.fromkeys(("client 1", "client 2", "client 3"), 1)  # it was sent all the same
    if privacy is DISTRIBUTED:  # of a secure sum nothing is left, and the honest shares are too few
        assert row["dropped"] == row["clients"] and torch.equal(state.params_P, start.params_P)
    else:  # a trusted server counts it as zero, over the same denominator
        assert "dropped" not in row and not torch.equal(state.params_P, start.params_P)


ADAPTIVE = {"kind": "adaptive", "quantile": 0.4}
KINDS = {
    "patient": {"privacy": PATIENT},
    "distributed": {"privacy": {**DISTRIBUTED, "num_colluding": 1}, "local": STEP, "server": {"kind": "adam"}},
    "client": {"privacy": CLIENT, "algorithm": {"kind": "fedavg", "clients_per_round": 2}},
    "adaptive local": {"privacy": {**DP, "clipping": ADAPTIVE}, "local": {"batch_size": 16, "steps": 2}},
    "adaptive patient, some": {
        "privacy": {**PATIENT, "clipping": ADAPTIVE}, "algorithm": {"kind": "fedprox", "clients_per_round": 2},
    },
    "adaptive distributed": {"privacy": {**DISTRIBUTED, "clipping": ADAPTIVE}, "local": STEP},
    "adaptive client": {"privacy": {**CLIENT, "clipping": ADAPTIVE}},
    "adaptive pooled": {"privacy": {**DP, "clipping": ADAPTIVE}, "algorithm": {"kind": "centralised"}},
    "per layer": {"privacy": {**DP, "clipping": {"kind": "per_layer"}}},
    "automatic": {"privacy": {**DP, "clipping": {"kind": "automatic"}}},
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_training_goes_on_bit_for_bit_at_the_same_epsilon(name):
    dataset, changes = tiny_dataset(), {"rounds": 3, "local": {"batch_size": 16, "steps": 1}, **KINDS[name]}
    federation = tiny_federation(dataset, **changes)
    undisturbed = trained_state(federation)
    claim = guarantee(federation, undisturbed)
    for killed_after in (1, 2):
        tensors, texts = trained_state(tiny_federation(dataset, **changes), killed_after).pack()
        again = tiny_federation(dataset, **changes)
        resumed = trained_state(again, state=TrainingState.unpack(tensors, texts, CPU))
        assert equal_states(resumed, undisturbed)
        assert resumed.clips == undisturbed.clips
        assert guarantee(again, resumed) == claim
    assert planned_events(federation) == claim.events_by_client
    assert claim.epsilon == max(epsilon(events, 1e-3) for events in claim.events_by_client.values())
    assert bool(undisturbed.clips) == name.startswith("adaptive")


def test_where_the_clip_is_one_for_all_it_moves_once_a_round_and_else_with_every_step():
    privacy = {**DP, "clip": 50.0, "clipping": ADAPTIVE}  # far above all norms: it falls
    local = trained_state(tiny_federation(privacy=privacy, local={"batch_size": 16, "steps": 3}))
    assert local.clips.keys() == {"client 1", "client 2", "client 3"} and len(set(local.clips.values())) == 3
    assert all(50 * math.exp(-0.2 * 0.9 * 6) < clip < 50 * math.exp(-0.2 * 0.3 * 6) for clip in local.clips.values())
    for one in ({**privacy, "trust": "distributed"}, {**privacy, "unit": "client", "trust": "central"}):
        state = trained_state(tiny_federation(privacy=one, **EIGHT))
        assert state.clips.keys() == {EVERYBODY}
        assert 50 * math.exp(-0.2 * 1.5 * 2) < state.clips[EVERYBODY] < 50
        assert guarantee(tiny_federation(privacy=one, **EIGHT), state).clip == 50


def test_a_target_epsilon_is_kept_under_distributed_noise_by_the_smallest_hospital():
    partition = {"kind": "quantity", "num_clients": 2, "sizes": [2, 1]}
    privacy = {"kind": "dp_sgd", "epsilon": 2.0, "delta": 1e-3, "trust": "distributed"}
    federation = tiny_federation(privacy=privacy, partition=partition, local={**STEP, "batch_size": 6}, rounds=2)
    sigmas = {client.plan.noise_multiplier for client in federation.clients}
    assert len(sigmas) == 1
    assert {client.plan.denominator for client in federation.clients} == {6.0}
    claim = guarantee(federation, trained_state(federation))
    values = list(claim.epsilon_by_client.values())
    assert 1.95 < values[1] <= 2.0 and values[0] < values[1]


def test_the_server_may_do_what_it_likes_with_a_noised_sum():
    changes = {"privacy": DISTRIBUTED, "local": STEP, "server": {"kind": "sgd", "momentum": 0.9}}
    assert trained_state(tiny_federation(**changes)).server["velocity"].any()
    # At the one step of a round FedProx has nothing to hold back yet.
    one, other = (
        noise_free(tiny_federation(privacy=DISTRIBUTED, local=STEP, algorithm={"kind": kind}))
        for kind in ("fedavg", "fedprox")
    )
    assert torch.allclose(one, other)


def noise_free(federation):
    return trained_state(opened(federation, Flat(1.0))).params_P


class Remembering(nn.Module):
    """Keeps a trace of the images that it was trained on in a buffer, as no layer of ours does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 3)
        self.register_buffer("trace", torch.zeros(64))

    def forward(self, x_BCHW):
        if self.training and not torch._C._functorch.is_gradtrackingtensor(x_BCHW):
            self.trace += x_BCHW.detach().flatten(1).sum(0)
        return self.layer(x_BCHW.flatten(1))


@pytest.mark.parametrize(("privacy", "kept"), [({"kind": "none"}, False), (CLIENT, True)])
def test_no_buffer_of_a_private_client_reaches_the_model(privacy, kept):
    federation = replace(tiny_federation(privacy=privacy), classifier=Classifier(Remembering(), 3))
    start = initial_state(federation)
    assert torch.equal(run_round(federation, start).buffers_Q, start.buffers_Q) == kept


BAD = [
    ({"privacy": {**DP, "unit": "client"}}, "unit 'client' needs trust 'central', not 'local'"),
    ({"privacy": {**CLIENT, "trust": "distributed"}}, "unit 'client' needs trust 'central', not 'distributed'"),
    ({"privacy": {**DP, "noise_multiplier": 1e-13}}, "noise_multiplier 1e-13 is below 0.01: so little noise protects"),
    ({"privacy": {**DP, "noise_multiplier": 0}}, "greater than 0"),
    ({"privacy": {**DP, "delta": 9e-11}}, "delta 9e-11 is below 1e-10, where the accountant's rounding errors"),
    ({"privacy": {**DP, "num_colluding": 1}}, "num_colluding 1 has a meaning under trust 'distributed' only"),
    ({"privacy": {**DP, "trust": "central"}}, "trust 'central' with unit 'example' is for algorithm 'centralised'"),
    ({"privacy": {**PATIENT, "trust": "central"}}, "trust 'central' with unit 'patient'"),
    ({"privacy": DISTRIBUTED, "local": {**STEP, "steps": 2}}, "trust 'distributed' needs local.steps = 1"),
    ({"privacy": DISTRIBUTED, "local": {**STEP, "steps": None, "epochs": 1}}, "needs local.steps = 1"),
    ({"privacy": DISTRIBUTED, "local": {**STEP, "optimizer": "adam"}}, "needs local.optimizer = 'sgd'"),
    ({"privacy": DISTRIBUTED, "local": {**STEP, "momentum": 0.9}}, "local.momentum = 0.*give it to the server"),
    (
        {"privacy": DISTRIBUTED, "local": STEP, "algorithm": {"kind": "centralised"}},
        "federation, and algorithm 'centralised' has none",
    ),
    (
        {"privacy": DISTRIBUTED, "local": STEP, "algorithm": {"kind": "local_only"}},
        "federation, and algorithm 'local_only' has none",
    ),
    (
        {"privacy": DISTRIBUTED, "local": STEP, "algorithm": {"kind": "fedavg", "weights": [1, 2, 3]}},
        "trust 'distributed' needs algorithm.weights 'equal'",
    ),
    (
        {"privacy": {**DISTRIBUTED, "num_colluding": 3}, "local": STEP},
        "num_colluding 3 leaves none of the 3 clients of a round to add the noise; it can be at most 2",
    ),
    (
        {"privacy": {**DISTRIBUTED, "num_colluding": 2}, "local": STEP,
         "algorithm": {"kind": "fedavg", "clients_per_round": 2}},
        "num_colluding 2 leaves none of the 2 clients of a round",
    ),
    ({"privacy": CLIENT, "algorithm": {"kind": "centralised"}}, "'centralised' has none; use unit 'example'"),
    ({"privacy": CLIENT, "algorithm": {"kind": "local_only"}}, "algorithm 'local_only' has none"),
    ({"privacy": CLIENT, "algorithm": {"kind": "fedavg", "weights": [1, 2, 3]}}, "unit 'client' needs algorithm"),
    ({"privacy": CLIENT, "algorithm": {"kind": "fedavg", "weights": "records"}}, "under DP use 'equal'"),
    ({"privacy": {**DP, "unit": "hospital"}}, "unit"),
    ({"privacy": {**DP, "clipping": {"kind": "adaptive", "quantile": 1.1}}}, "quantile"),
    ({"privacy": {**DP, "clipping": {"kind": "automatic", "gamma": 0}}}, "gamma"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD, ids=range(len(BAD)))
def test_what_no_guarantee_could_hold_for_is_refused_with_the_reason(changes, message):
    with pytest.raises(ValidationError, match=message):
        tiny_spec(**changes)


@pytest.mark.parametrize(("privacy", "what"), [(DISTRIBUTED, "trust 'distributed'"), (CLIENT, "unit 'client'")])
def test_a_rule_other_than_the_mean_is_refused(privacy, what):
    spec = tiny_spec(privacy=privacy, local=STEP)
    assert why_unsound(spec) == ""
    reason = why_unsound(spec.model_copy(update={"aggregation": Median()}))
    assert reason.startswith(f"{what} needs aggregation 'mean', not 'median'")


@pytest.mark.parametrize(
    ("privacy", "message"),
    [
        ({**PATIENT, "delta": 0.07}, "client 'client 1': privacy.delta 0.07 is not below 1 / 16 patients"),
        ({**DISTRIBUTED, "delta": 0.04}, "client 'client 1': privacy.delta 0.04 is not below 1 / 32 records"),
        ({**CLIENT, "delta": 0.4}, "privacy: privacy.delta 0.4 is not below 1 / 3 clients"),
        ({**CLIENT, "noise_multiplier": None, "epsilon": 1e-4}, "out of reach in 2 steps at sampling rate 1"),
    ],
)
def test_what_only_the_data_show_is_refused_before_anything_runs(privacy, message):
    with pytest.raises(UserError, match=message):
        tiny_federation(privacy=privacy, local=STEP)


def test_delta_is_held_against_the_largest_hospital_too():
    sizes = {
        "partition": {"kind": "quantity", "num_clients": 3, "sizes": [4, 3, 1]},
        "local": {**STEP, "batch_size": 6},
    }
    for privacy in (DP, DISTRIBUTED):  # of 48, 36 and 12 records
        tiny_federation(privacy={**privacy, "delta": 1 / 49}, **sizes)
        with pytest.raises(UserError, match="client 'client 1': privacy.delta 0.025 is not below 1 / 48 records"):
            tiny_federation(privacy={**privacy, "delta": 0.025}, **sizes)


def test_given_noise_skips_no_check():
    spec = DpSgd.model_validate({**DISTRIBUTED, "delta": 0.01})
    assert spec.make(99, 10, 5, noise=1.0, num_honest=3).noise_multiplier == 1.0
    with pytest.raises(ValueError, match="not below 1 / 100 records"):
        spec.make(100, 10, 5, noise=1.0, num_honest=3)
    with pytest.raises(ValueError, match="batch_size 100 exceeds its 99 records"):
        spec.make(99, 100, 5, noise=1.0, num_honest=3)


SMALL_DENSENET = {"init_features": 8, "growth_rate": 8, "block_config": [1, 1], "norm": ["group", {"num_groups": 8}]}


def test_what_is_advised_against_batch_norm_helps():
    def federation(network, arguments):
        model = {"kind": "monai", "network": network, "arguments": arguments}
        return tiny_federation(tiny_dataset(size=32), privacy=DP, local=STEP, model=model)

    with pytest.raises(UserError, match="batch statistics.*MONAI's ResNets and SENets keep batch norm"):
        federation("resnet10", {"norm": ["group", {"num_groups": 8}]})  # it has its batch norm all the same
    for network, arguments in (
        ("DenseNet", SMALL_DENSENET), ("DenseNet", {**SMALL_DENSENET, "norm": "instance"}),
        ("EfficientNetBN", {"model_name": "efficientnet-b0", "norm": ["group", {"num_groups": 8}]}),
        ("ViT", {"patch_size": 16, "hidden_size": 12, "mlp_dim": 12, "num_layers": 1, "num_heads": 2}),
    ):  # fmt: skip
        federation(network, arguments)
    one = federation("DenseNet", SMALL_DENSENET)
    assert trained_state(one, rounds=1).params_P.isfinite().all()


def test_a_batch_of_more_patients_than_there_are_is_refused():
    with pytest.raises(UserError, match="client 'client 1': local.batch_size 17 exceeds its 16 patients"):
        tiny_federation(privacy=PATIENT, local={**STEP, "batch_size": 17})


def test_batch_norm_is_refused_under_every_unit():
    for privacy in (PATIENT, CLIENT, DISTRIBUTED):
        with pytest.raises(UserError, match="batch statistics"):
            tiny_federation(privacy=privacy, local=STEP, model={"kind": "resnet9", "width": 4, "norm": "batch"})


WORDS = {
    "example local": ({"privacy": DP}, ["any one image of a hospital", "neither the server nor another hospital"]),
    "patient local": (
        {"privacy": PATIENT},
        [
            "all images of any one patient",
            "number of patients",
            "at two hospitals: the epsilons of both add up, and their deltas",
        ],
    ),
    "distributed": (
        {"privacy": DISTRIBUTED, "local": STEP},
        [
            "sound only under a secure sum",
            "does not hide its parts",
            "Every hospital must add its share",
            "not about a hospital that takes part",
            "2 of 3 shares are left, 0.816 of the stated noise",
        ],
    ),
    "distributed, one colludes": (
        {"privacy": {**DISTRIBUTED, "num_colluding": 1}, "local": STEP},
        [
            "sound only under a secure sum",
            "for the others even if 1 hospital should side with the server",
            "take away the share of it that a hospital knows as its own",
        ],
    ),
    "client": (
        {"privacy": CLIENT},
        ["any one hospital and all its images", "must be trusted", "which hospitals took part", "number of hospitals"],
    ),
    "pooled": (
        {"privacy": {**PATIENT, "trust": "central"}, "algorithm": {"kind": "centralised"}},
        ["all images of any one patient", "pooled in one place", "goes by two names"],
    ),
    "weights": (
        {"privacy": DP, "algorithm": {"kind": "fedavg", "weights": [1, 2, 3]}},
        ["weights of the hospitals, which must not have been chosen by looking"],
    ),
    "adaptive": ({"privacy": {**DP, "clipping": ADAPTIVE}}, ["Clipping norm 1 at first (adaptive 40 %)"]),
}


@pytest.mark.parametrize("name", WORDS)
def test_the_guarantee_says_in_words_what_it_rests_on(name):
    changes, phrases = WORDS[name]
    federation = tiny_federation(**changes)
    claim = guarantee(federation, trained_state(federation))
    words = claim.in_words()
    for phrase in (*phrases, "noise multiplier 1 in 2 steps at sampling rate", "seeded noise", "choice of settings"):
        assert phrase in words
    assert type(claim).model_validate_json(claim.model_dump_json()) == claim


def test_a_guarantee_that_a_curious_hospital_weakens_says_by_how_much():
    def claimed(**changes):
        federation = tiny_federation(privacy={**DISTRIBUTED, "noise_multiplier": 0.7, **changes}, local=STEP)
        return federation, guarantee(federation, trained_state(federation))

    federation, claim = claimed()
    (phrase,) = [phrase for phrase in claim.outside if "takes part" in phrase]
    left = claim.events_by_client["client 1"][0].model_copy(update={"noise_multiplier": 0.7 * math.sqrt(2 / 3)})
    assert f"at most {math.ceil(100 * epsilon([left], 1e-3)) / 100:.2f} (num_colluding = 1" in phrase
    assert epsilon([left], 1e-3) > 1.2 * claim.epsilon
    _, covered = claimed(num_colluding=1)
    assert covered.epsilon == claim.epsilon and not [phrase for phrase in covered.outside if "takes part" in phrase]
    alone = {"kind": "fedavg", "clients_per_round": 1}
    only = tiny_federation(privacy=DISTRIBUTED, local=STEP, algorithm=alone)
    assert "takes part" not in " ".join(guarantee(only, trained_state(only)).outside)


@pytest.mark.parametrize("noise", ["seeded", "system"])
def test_who_took_part_is_not_in_the_history_where_it_must_stay_secret(noise):
    few = {"kind": "fedavg", "clients_per_round": 1}
    federation = tiny_federation(privacy={**CLIENT, "noise": noise}, algorithm=few, rounds=8)
    state = trained_state(federation)
    public = {"round", "loss", "val_accuracy", "val_loss"}
    assert all(row.keys() == public and row["loss"] is None for row in state.history)
    assert not any(client.name in json.dumps(state.history) for client in federation.clients)
    assert state.seconds == state.unlisted_seconds > 0
    packed = TrainingState.unpack(*state.pack(), CPU)
    assert packed.seconds == state.seconds
    assert run_round(federation, packed).seconds > state.seconds
    assert any("no report or export holds them" in phrase for phrase in guarantee(federation, state).outside)


@pytest.mark.parametrize("privacy", [DP, PATIENT, {**DISTRIBUTED, "num_colluding": 1}])
def test_training_losses_are_kept_with_noise_from_a_seed_only(privacy):
    seeded, system = (tiny_federation(privacy={**privacy, "noise": n}, local=STEP) for n in ("seeded", "system"))
    assert all(row["loss"] is not None for row in trained_state(seeded).history)
    state = trained_state(system)
    assert all(row["loss"] is None and row["val_loss"] is not None and row["clients"] for row in state.history)
    outside = guarantee(system, state).outside
    assert any("counted once" in phrase for phrase in outside) and any("are not kept" in phrase for phrase in outside)
    assert not any("counted once" in phrase for phrase in guarantee(seeded, state).outside)


def test_noise_from_the_system_differs_every_time_and_is_said():
    for changes in (
        {"privacy": {**DISTRIBUTED, "noise": "system"}, "local": STEP},
        {"privacy": {**CLIENT, "noise": "system"}},
    ):
        federation = tiny_federation(**changes)
        one, other = trained_state(federation), trained_state(tiny_federation(**changes))
        assert not torch.equal(one.params_P, other.params_P)
        assert "operating system" in guarantee(federation, one).noise_source
    shared = tiny_federation(privacy={**DISTRIBUTED, "noise": "system"}, local=STEP)
    assert any("rounding" in phrase for phrase in guarantee(shared, one).outside)


def test_each_hospital_is_charged_what_its_own_rate_costs():
    partition = {"kind": "quantity", "num_clients": 3, "sizes": [4, 3, 1]}
    federation = tiny_federation(privacy=DISTRIBUTED, partition=partition, local={**STEP, "batch_size": 6})
    events = guarantee(federation, trained_state(federation)).events_by_client
    assert [events[f"client {i}"] for i in (1, 2, 3)] == [
        (DpEvent(noise_multiplier=1.0, sampling_rate=6 / num, steps=2),) for num in (48, 36, 12)
    ]


def test_several_clients_with_one_event_are_said_once():
    same = tiny_federation(privacy=CLIENT)
    assert guarantee(same, trained_state(same)).in_words().count("sampling rate 1") == 1


FLIP = {"kind": "label_flip", "clients": [1], "share": 0.5}


def test_a_record_less_changes_which_other_records_of_a_malicious_hospital_are_poisoned():
    # Why nothing is promised to it: neighbouring data sets differ in more than one record once they are poisoned.
    whole, without = (set(choose_records(n, 0.5, torch.Generator().manual_seed(0)).tolist()) for n in (32, 31))
    assert len(whole ^ without) > 1


@pytest.mark.parametrize("privacy", [DP, PATIENT, DISTRIBUTED], ids=["local", "patient", "distributed"])
def test_nothing_is_promised_to_a_malicious_hospital(privacy):
    federation = tiny_federation(privacy=privacy, local=STEP, threat=FLIP)
    state = trained_state(federation)
    claim = guarantee(federation, state)
    honest = guarantee(tiny_federation(privacy=privacy, local=STEP), state)
    assert claim.epsilon_by_client.keys() == {"client 1", "client 3"}
    assert claim.epsilon_by_client.items() < honest.epsilon_by_client.items()
    assert claim.events_by_client == honest.events_by_client  # a book charges them all
    assert not claim.void and set(claim.outside) - set(honest.outside) == {
        "client 2 is malicious in this study: nothing is promised for its images"
    }


def test_the_largest_epsilon_is_that_of_the_honest():
    partition = {"kind": "quantity", "num_clients": 3, "sizes": [4, 1, 3]}  # the smallest has the largest epsilon
    weak = {"privacy": {**DISTRIBUTED, "noise_multiplier": 0.7}, "local": {**STEP, "batch_size": 6}}
    claims = []
    for threat in ({"kind": "none"}, FLIP):
        federation = tiny_federation(**weak, partition=partition, threat=threat)
        claims.append(guarantee(federation, trained_state(federation)))
    everybody, honest = claims
    assert honest.epsilon == max(everybody.epsilon_by_client[name] for name in ("client 1", "client 3"))
    assert honest.epsilon < everybody.epsilon
    curious = [[p for p in claim.outside if "can take its own share" in p] for claim in claims]
    assert curious[0] != curious[1]


def test_pooled_images_of_a_malicious_hospital_are_named_and_the_others_keep_their_promise():
    federation = tiny_federation(privacy={**DP, "trust": "central"}, algorithm={"kind": "centralised"}, threat=FLIP)
    claim = guarantee(federation, trained_state(federation))
    assert claim.epsilon > 0 and "hospital 2 of the pool is malicious in this study" in claim.in_words()


@pytest.mark.parametrize("algorithm", [{"kind": "local_only", "client": 1}, {"kind": "fedavg"}])
def test_a_training_of_malicious_hospitals_alone_promises_nothing(algorithm):
    clients = [1] if algorithm["kind"] == "local_only" else [0, 1, 2]
    federation = tiny_federation(privacy=DP, algorithm=algorithm, threat={**FLIP, "clients": clients})
    claim = guarantee(federation, trained_state(federation))
    assert claim.epsilon is None and claim.in_words().startswith("No guarantee: client ")
    assert "client 2 is malicious in this study: nothing is promised for its images" in claim.void


def test_a_malicious_hospital_as_a_whole_keeps_its_promise():
    federation = tiny_federation(privacy=CLIENT, threat=FLIP)
    claim = guarantee(federation, trained_state(federation))
    assert len(claim.epsilon_by_client) == 3 and "malicious" not in claim.in_words()


@pytest.mark.parametrize("noise_multiplier", [1.0, 0.3])
def test_several_images_of_a_patient_are_promised_what_the_theorem_gives(noise_multiplier):
    federation = tiny_federation(privacy={**DP, "noise_multiplier": noise_multiplier})
    state = trained_state(federation)
    claim = guarantee(federation, state)
    (phrase,) = [phrase for phrase in claim.outside if phrase.startswith("a patient with")]
    said = group_in_words(claim.epsilon, 1e-3, 2)  # every patient of this data has two images
    assert phrase.endswith(f"here some patient has 2, and for 2 {said}") and "e^((k - 1) * epsilon) times" in phrase
    assert ("nothing is promised" in said) == (noise_multiplier < 1)
    unknown = [replace(shard, records=replace(shard.records, patients_N=shard.records.patients_N * 0 - 1))
               for shard in federation.clients[0].shards]  # fmt: skip
    clients = (replace(federation.clients[0], shards=tuple(unknown)), *federation.clients[1:])
    (phrase,) = [
        phrase
        for phrase in guarantee(replace(federation, clients=clients), state).outside
        if phrase.startswith("a patient with")
    ]
    assert f"so that for 2 {said}; which belong together is not known" in phrase


@pytest.mark.parametrize(("privacy", "start"), [
    ({**PATIENT, "trust": "distributed"}, "a patient with images at two"), (CLIENT, "images of one patient"),
])  # fmt: skip
def test_where_one_noise_protects_several_units_they_are_a_group(privacy, start):
    federation = tiny_federation(privacy=privacy, local=STEP)
    claim = guarantee(federation, trained_state(federation))
    (phrase,) = [phrase for phrase in claim.outside if phrase.startswith(start)]
    assert phrase.endswith(group_in_words(claim.epsilon, 1e-3, 2))
