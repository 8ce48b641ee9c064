"""A teacher of the hospitals' own: what its students learn, what both cost, and that they share no noise."""

from dataclasses import replace

import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from pydantic import ValidationError
from torch.nn import functional as F

from helpers.tiny_federation import DP, equal_states, tiny_dataset, tiny_federation, tiny_spec, trained_state
from trilemma.errors import UserError
from trilemma.federation import round as rounds
from trilemma.federation.clients import participants
from trilemma.federation.local_training import CRAFTED_TOGETHER, batches, load_batch, load_model
from trilemma.federation.root import root_update
from trilemma.federation.round import run_round
from trilemma.federation.streams import client_stream, private_generator
from trilemma.federation.teaching import TeacherTraining, phases, teacher_spec, total_rounds, with_teacher
from trilemma.federation.training import guarantee, initial_state, planned_events, taught, trained_model
from trilemma.models.vector import get_params, set_params
from trilemma.privacy import bookkeeping, clipping
from trilemma.privacy.clipping_rules import Flat
from trilemma.randomness import generator
from trilemma.robustness.objectives import mean_cross_entropy, standard
from trilemma.robustness.specs import PgdTraining, Trades

TEACHER = {"model": {"kind": "resnet9", "width": 6}, "rounds": 3}
BATCH_NORM = {"kind": "resnet9", "width": 4, "norm": "batch"}
STEP = {"batch_size": 8, "steps": 1, "learning_rate": 0.1, "momentum": 0}
DISTRIBUTED = {**DP, "trust": "distributed"}
CLIENT = {**DP, "unit": "client", "trust": "central"}
PATIENT = {**DP, "unit": "patient"}


def taught_federation(dataset=None, **changes):
    """A federation whose teacher has learnt, and the teacher's last state."""
    federation = tiny_federation(dataset, **{"teacher": TEACHER, "local": STEP, **changes})
    learnt = trained_state(federation.teacher)
    return taught(federation, learnt), learnt


def soft(teacher, x_BCHW, y_B, share):
    """The naive targets, record by record."""
    rows = []
    for x, y in zip(x_BCHW, y_B.tolist(), strict=True):
        with torch.no_grad():
            answer = teacher(x[None])[0].exp()
        label = torch.tensor([float(k == y) for k in range(len(answer))])
        rows.append((1 - share) * label + share * answer / answer.sum())
    return torch.stack(rows)


def naive_loss(logits_K, target_K):
    return -sum(p * log_q for p, log_q in zip(target_K, (logits_K - logits_K.logsumexp(0)), strict=True))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_students_step_is_the_one_made_by_hand(share):
    """The twin: each client's batch, its targets from the teacher's answers, one step of SGD, and the mean of all."""
    federation, learnt = taught_federation(teacher={**TEACHER, "share": share})
    teacher = trained_model(federation.teacher, learnt)
    state, spec = initial_state(federation), federation.spec
    steps = []
    for client in federation.clients:
        load_model(federation.classifier, state.params_P, state.buffers_Q)
        (drawn,) = batches(spec, client, client.num_records, 0)
        records = client.shards[0].records
        x_BCHW, y_B = records.x(drawn), records.y(drawn)
        logits_BK = federation.classifier.train()(x_BCHW)
        losses = [naive_loss(*pair) for pair in zip(logits_BK, soft(teacher, x_BCHW, y_B, share), strict=True)]
        gradients = torch.autograd.grad(sum(losses) / 8, list(federation.classifier.parameters()))
        steps.append(-0.1 * torch.cat([gradient.flatten() for gradient in gradients]))
    expected_P = state.params_P + torch.stack(steps).mean(0)
    found_P = run_round(federation, state).params_P
    assert float((found_P - state.params_P).norm()) > 0.01
    torch.testing.assert_close(found_P, expected_P, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("multiplicity", [1, 2, 66])
def test_a_private_step_clips_the_gradient_made_by_hand_and_adds_the_students_noise(multiplicity):
    """The twin: one record after the other; 66 copies are more than the engine takes at once."""
    augmentation = {"shift": 1, "flip": True, "multiplicity": multiplicity} if multiplicity > 1 else {}
    local = {**STEP, "batch_size": 3, "augmentation": augmentation}
    federation, learnt = taught_federation(
        tiny_dataset(30), privacy={**DP, "clip": 0.5, "noise_multiplier": 0.3}, local=local,
        teacher={**TEACHER, "rounds": 1},
    )  # fmt: skip
    teacher = trained_model(federation.teacher, learnt)
    state, spec, client = initial_state(federation), federation.spec, federation.clients[1]
    records = client.shards[0].records
    (drawn,) = batches(spec, client, client.num_records, 0)
    changes = generator(*client_stream(spec, client, "augmentation", 0))
    x_BCHW, y_B = load_batch(spec.local.augmentation, records, drawn, changes, torch.device("cpu"))
    load_model(federation.classifier, state.params_P, state.buffers_Q)
    classifier, clipped, total_P = federation.classifier.train(), 0, torch.zeros_like(state.params_P)
    for x_SCHW, y_S in zip(x_BCHW.split(multiplicity), y_B.split(multiplicity), strict=True):
        targets = soft(teacher, x_SCHW, y_S, 0.5)
        loss = sum(naive_loss(*pair) for pair in zip(classifier(x_SCHW), targets, strict=True)) / multiplicity
        gradient_P = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(classifier.parameters()))])
        norm = float(gradient_P.norm())
        clipped += norm > 0.5
        total_P += gradient_P * min(1.0, 0.5 / norm)
    draws = private_generator(spec, client.fingerprint, "noise", 0, client.number)
    noise_P = torch.from_numpy(draws.standard_normal(len(total_P), "float32"))
    expected_P = -0.1 * (total_P + 0.3 * 0.5 * noise_P) / 3
    alone = replace(federation, clients=(client,))
    found_P = run_round(alone, state).params_P - state.params_P
    assert clipped and 0 < len(x_BCHW) <= CRAFTED_TOGETHER  # more would be changed in parts
    torch.testing.assert_close(found_P, expected_P, rtol=1e-3, atol=2e-6)


def test_the_teachers_answers_make_another_model_and_a_share_of_nearly_none_does_not():
    """Negative control: without a teacher, on the same batches, the model is that of hardly any share."""
    plain = trained_state(tiny_federation(local=STEP))
    half = trained_state(taught_federation()[0])
    nearly_none = trained_state(taught_federation(teacher={**TEACHER, "share": 1e-7})[0])
    assert float((half.params_P - plain.params_P).norm()) > 0.01
    torch.testing.assert_close(nearly_none.params_P, plain.params_P, rtol=1e-4, atol=1e-5)


# --- what both cost


def by_dp_accounting(noise, rate, steps, delta=1e-3):
    accountant = PLDAccountant()
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    return accountant.get_epsilon(delta)


def test_both_phases_are_composed():
    federation, learnt = taught_federation(privacy=DP, local={**STEP, "steps": 2})
    state = trained_state(federation)
    both, first = guarantee(federation, state), guarantee(federation.teacher, learnt)
    second = guarantee(federation, replace(state, private_steps=dict.fromkeys(state.private_steps, 4)))
    assert both.events_by_client == planned_events(federation)
    assert first.events_by_client == planned_events(federation.teacher)
    assert {(e.steps, e.noise_multiplier, e.sampling_rate) for (e,) in both.events_by_client.values()} == {
        (10, 1.0, 0.25)
    }
    assert both.epsilon == pytest.approx(by_dp_accounting(1.0, 8 / 32, 3 * 2 + 2 * 2), rel=0.02)
    assert both.epsilon > 1.1 * first.epsilon > 1.1 * second.epsilon > 0


@pytest.mark.parametrize("privacy", [{}, {"trust": "distributed"}, {"unit": "client", "trust": "central"}])
def test_the_noise_is_calibrated_so_that_both_together_cost_what_was_asked_for(privacy):
    asked = {"kind": "dp_sgd", "epsilon": 3.0, "delta": 1e-3, **privacy}
    federation, learnt = taught_federation(privacy=asked, local={**STEP, "batch_size": 32})
    state = trained_state(federation)
    claim = guarantee(federation, state)
    assert claim.events_by_client == planned_events(federation)
    assert 2.98 < claim.epsilon <= 3.0
    assert guarantee(federation.teacher, learnt).epsilon < 2.5


def test_hospitals_are_charged_for_the_rounds_of_both_that_they_take_part_in():
    federation, learnt = taught_federation(privacy=DP, algorithm={"kind": "fedavg", "clients_per_round": 1}, rounds=4)
    state = trained_state(federation)
    assert sum(learnt.private_steps.values()) == 3 and sum(state.private_steps.values()) == 7
    planned = {name: event.steps for name, (event,) in planned_events(federation).items()}
    assert planned == {name: state.private_steps.get(name, 0) for name in planned}


def test_teacher_and_student_are_private_by_one_plan():
    federation = tiny_federation(teacher=TEACHER, privacy=DP, local=STEP)
    assert federation.teacher.clients == federation.clients and federation.teacher.plan == federation.plan
    server = tiny_federation(teacher=TEACHER, privacy=CLIENT, local=STEP)
    assert server.teacher.plan is server.plan is not None
    assert planned_events(server)["client 1"][0].steps == 5


def test_where_it_is_secret_who_takes_part_every_round_of_both_is_charged():
    federation, learnt = taught_federation(privacy=CLIENT, algorithm={"kind": "fedavg", "clients_per_round": 1})
    state = trained_state(federation)
    assert set(learnt.private_steps.values()) == {3} and set(state.private_steps.values()) == {5}
    assert guarantee(federation, state).events_by_client == planned_events(federation)


@pytest.mark.parametrize(
    "privacy", [PATIENT, DISTRIBUTED, {**DP, "noise": "system"}, {**DP, "clipping": {"kind": "adaptive"}}]
)
def test_every_kind_of_privacy_learns_from_a_teacher(privacy):
    federation, _ = taught_federation(privacy=privacy)
    state = trained_state(federation)
    assert state.params_P.isfinite().all() and set(state.private_steps.values()) == {5}
    assert guarantee(federation, state).events_by_client == planned_events(federation)


# --- what they draw


def test_teacher_and_student_share_no_noise_and_no_samples():
    spec = tiny_spec(teacher=TEACHER, privacy=DP, local={**STEP, "steps": 4}, rounds=3)
    first, second = phases(spec)
    assert isinstance(first, TeacherTraining) and second is spec and total_rounds(spec) == 6
    for role in ("noise", "poisson"):
        drawn = [
            private_generator(phase, "f0", role, index, 0).standard_normal(4).tolist()
            for phase in (first, second) for index in range(3)
        ]  # fmt: skip
        assert len({tuple(numbers) for numbers in drawn}) == 6
    federation = tiny_federation(teacher=TEACHER, privacy=DP, local={**STEP, "steps": 4})
    client = federation.clients[0]
    assert list(batches(first, client, 32, 0)) != list(batches(second, client, 32, 0))
    assert client_stream(first, client, "dropout", 0) != client_stream(second, client, "dropout", 0)


def test_without_privacy_they_draw_differently_too_and_a_training_without_a_teacher_as_ever():
    spec = tiny_spec(teacher=TEACHER, local=STEP, algorithm={"kind": "fedavg", "clients_per_round": 1}, rounds=20)
    first, client = teacher_spec(spec), tiny_federation(local=STEP).clients[0]
    assert list(batches(first, client, 32, 0)) != list(batches(spec, client, 32, 0))
    assert client_stream(first, client, "dropout", 0) == (0, "dropout", "teacher", 0, 0)
    assert client_stream(spec, client, "dropout", 0) == (0, "dropout", 0, 0)
    assert [participants(first, 3, i) for i in range(20)] != [participants(spec, 3, i) for i in range(20)]


def test_no_other_training_has_the_key_of_a_teachers():
    """Nor, with it, its noise: an ordinary training of the teacher's network, or another student's teacher."""
    spec = tiny_spec(teacher=TEACHER, privacy=DP)
    ordinary = tiny_spec(model=TEACHER["model"], rounds=TEACHER["rounds"], privacy=DP)
    longer, wider = tiny_spec(teacher=TEACHER, privacy=DP, rounds=9), tiny_spec(
        teacher=TEACHER, privacy=DP, model={"kind": "resnet9", "width": 8}
    )  # fmt: skip
    keys = [spec.key, ordinary.key, *(teacher_spec(one).key for one in (spec, longer, wider))]
    assert len(set(keys)) == 5
    first = teacher_spec(spec)
    assert {**dict(first), "student": None} == {**dict(ordinary), "student": None}


def test_a_teacher_is_not_made_small():
    spec = tiny_spec(
        teacher=TEACHER, downlink={"kind": "dense", "numbers": "int8"}, pruning={"kind": "gradual"},
        quantisation={"kind": "int8"}, codec={"kind": "dense", "numbers": "int8"},
        defence={"kind": "fgsm", "radius": 0.01}, averaging={"decay": 0.5},
    )  # fmt: skip
    first = teacher_spec(spec)
    assert (first.teacher, first.downlink, first.pruning, first.quantisation) == (None,) * 4
    for field in ("data", "partition", "local", "defence", "averaging", "codec", "seed", "algorithm", "aggregation"):
        assert getattr(first, field) == getattr(spec, field)
    federation, _ = taught_federation(
        **{name: getattr(spec, name) for name in ("downlink", "pruning", "quantisation", "codec", "averaging")}
    )
    assert trained_state(federation).params_P.isfinite().all()


# --- the objective


def test_labels_as_certainties_are_labels():
    draws = torch.Generator().manual_seed(0)
    logits_BVK, y_B = torch.randn(6, 2, 3, generator=draws), torch.tensor([0, 1, 2, 2, 1, 0])
    p_BK = torch.rand(6, 3, generator=draws).softmax(1)
    for loss in (mean_cross_entropy, Trades().make().loss):
        torch.testing.assert_close(loss(logits_BVK, F.one_hot(y_B, 3).float()), loss(logits_BVK, y_B))
        one_hot_BKK = [loss(logits_BVK, torch.full((6,), k)) for k in range(3)]
        mixed_B = sum(p_BK[:, k] * one_hot_BKK[k] for k in range(3))  # the losses are linear in the target
        torch.testing.assert_close(loss(logits_BVK, p_BK), mixed_B)


@pytest.mark.parametrize("defence", [PgdTraining(steps=1), Trades(steps=1)], ids=lambda spec: spec.kind)
def test_views_are_attacked_as_without_a_teacher_and_both_engines_agree(defence):
    federation, learnt = taught_federation(defence=defence)
    teacher, classifier = trained_model(federation.teacher, learnt), federation.classifier.train()
    plain = defence.make()
    objective = with_teacher(federation.spec, plain, teacher)
    x_BCHW, y_B = tiny_dataset().train.x(slice(0, 6)), tiny_dataset().train.y(slice(0, 6))
    x_BVCHW, own = (one.views(classifier, x_BCHW, y_B, torch.Generator().manual_seed(1)) for one in (objective, plain))
    assert torch.equal(x_BVCHW, own)
    targets_BK = objective.targets(x_BCHW, y_B)
    torch.testing.assert_close(targets_BK, soft(teacher, x_BCHW, y_B, 0.5))
    assert torch.equal(plain.targets(x_BCHW, y_B), y_B)
    assert objective.targets(x_BCHW[:0], y_B[:0]).shape == (0, 3)
    fast, reference = (
        engine(classifier, objective.loss, x_BVCHW, targets_BK, Flat(0.3))
        for engine in (bookkeeping.clipped_gradient_sum, clipping.clipped_gradient_sum)
    )
    torch.testing.assert_close(fast.sum_P, reference.sum_P, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fast.norms_B, reference.norms_B, rtol=1e-4, atol=1e-6)


def test_a_records_target_depends_on_that_record_and_the_teacher_alone():
    federation, learnt = taught_federation()
    teacher = trained_model(federation.teacher, learnt)
    objective = with_teacher(federation.spec, standard(), teacher)
    records, before_P = tiny_dataset().train, get_params(teacher).clone()
    assert len(before_P) > len(get_params(federation.classifier))
    whole_BK = objective.targets(records.x(), records.y())
    alone_BK = objective.targets(records.x([7]), records.y([7]))
    torch.testing.assert_close(whole_BK[7:8], alone_BK)
    trained_state(federation)
    kept_P = torch.cat([parameter.flatten() for parameter in federation.trained_teacher.parameters()])
    assert torch.equal(kept_P, before_P) and not federation.trained_teacher.training
    assert not any(parameter.requires_grad for parameter in federation.trained_teacher.parameters())


def test_a_teacher_with_class_shares_answers_about_the_same_frequencies_as_the_student():
    shares = (0.7, 0.2, 0.1)
    federation, _ = taught_federation(local={**STEP, "class_shares": shares}, teacher={**TEACHER, "share": 1.0})
    spec, teacher = federation.spec, federation.trained_teacher
    objective = with_teacher(spec, spec.local.adjusted(standard()), teacher)
    x_BCHW, y_B = tiny_dataset().train.x(slice(0, 5)), tiny_dataset().train.y(slice(0, 5))
    logits_BK = teacher(x_BCHW)
    targets_BK = objective.targets(x_BCHW, y_B)
    entropy_B = -(targets_BK * targets_BK.log()).sum(1)
    # A student that answers as the teacher does cannot learn anything: its loss is the least that there is.
    torch.testing.assert_close(objective.loss(logits_BK[:, None], targets_BK), entropy_B)


def test_what_the_workspace_does_later_leaves_the_answers_alone():
    federation, learnt = taught_federation()
    answers = federation.trained_teacher(tiny_dataset().train.x(slice(0, 4)))
    set_params(federation.teacher.classifier, torch.zeros_like(learnt.params_P))
    assert torch.equal(federation.trained_teacher(tiny_dataset().train.x(slice(0, 4))), answers)


# --- other ways to train


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": {"kind": "centralised"}},
        {"algorithm": {"kind": "local_only", "client": 1}},
        {"model": BATCH_NORM, "teacher": {**TEACHER, "model": BATCH_NORM}},
        {"threat": {"kind": "label_flip", "num_malicious": 1}, "aggregation": {"kind": "median"}},
        {"local": {**STEP, "precision": "bfloat16"}, "server": {"kind": "adam"}},
    ],
    ids=["pooled", "alone", "batch-norm", "threat", "bfloat16"],
)  # fmt: skip
def test_it_goes_with_all_else_and_two_runs_are_one(changes):
    one, other = (trained_state(taught_federation(**changes)[0]) for _ in range(2))
    assert equal_states(one, other) and one.params_P.isfinite().all()
    assert one.round == len(one.history) == 2


def test_a_server_with_images_of_its_own_learns_as_the_clients_do(monkeypatch):
    federation, _ = taught_federation(
        aggregation={"kind": "fltrust", "num_images": 16}, teacher={**TEACHER, "share": 1}
    )
    state, root = initial_state(federation), federation.root
    update_P = root_update(federation.spec, root, federation.classifier, state, 1, federation.trained_teacher)
    other = replace(root, labels_N=(root.labels_N + 1) % 3)  # the teacher's answers alone are learnt
    assert torch.equal(
        update_P, root_update(federation.spec, other, federation.classifier, state, 1, federation.trained_teacher)
    )
    assert not torch.equal(update_P, root_update(federation.spec, root, federation.classifier, state, 1))
    seen = []
    monkeypatch.setattr(rounds, "root_update", lambda *rest: seen.append(rest[-1]) or root_update(*rest))
    run_round(federation, state)
    assert seen == [federation.trained_teacher]


# --- refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"defence": {"kind": "mart"}}, "defence 'mart'.*use 'trades' or 'pgd', or leave teacher out"),
        (
            {"threat": {"kind": "sign_flip", "num_malicious": 1, "when": {"first": 1}}},
            "threat.when counts the rounds of one training.*leave when out",
        ),
        ({"teacher": {**TEACHER, "share": 0}}, "teacher.share"),
        ({"teacher": {**TEACHER, "share": 1.1}}, "teacher.share"),
        ({"teacher": {**TEACHER, "rounds": 0}}, "teacher.rounds"),
        ({"teacher": {"model": TEACHER["model"]}}, "teacher.rounds"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(changes, words):
    with pytest.raises(ValidationError, match=f"(?s){words}"):
        tiny_spec(**{"teacher": TEACHER, **changes})


def test_a_teacher_with_batch_norm_is_refused_under_privacy_and_named():
    batch = {**TEACHER, "model": BATCH_NORM}
    with pytest.raises(UserError, match="batch statistics") as refused:
        tiny_federation(teacher=batch, privacy=DP)
    assert refused.value.where == "teacher.model.norm" and "norm" in refused.value.remedy
    tiny_federation(teacher=batch)


def test_a_student_waits_for_its_teacher():
    federation = tiny_federation(teacher=TEACHER, local=STEP)
    with pytest.raises(ValueError, match="trains that first"):
        initial_state(federation)
    with pytest.raises(ValueError, match="trains that first"):
        run_round(federation, initial_state(tiny_federation()))
    with pytest.raises(ValueError, match="ended all of its rounds"):
        taught(federation, trained_state(federation.teacher, rounds=2))
    with pytest.raises(ValueError, match="ended all of its rounds"):
        taught(tiny_federation(), trained_state(tiny_federation()))


def test_a_teacher_that_went_to_infinity_has_no_answers():
    federation = tiny_federation(teacher=TEACHER, local=STEP)
    learnt = trained_state(federation.teacher)
    with pytest.raises(UserError, match="became infinite") as refused:
        taught(federation, replace(learnt, params_P=learnt.params_P * float("inf")))
    assert refused.value.where == "teacher" and "learning_rate" in refused.value.remedy


def test_its_label_tells_what_is_different():
    specs = [
        TEACHER,
        {**TEACHER, "share": 0.9},
        {**TEACHER, "rounds": 4},
        {**TEACHER, "model": {"kind": "resnet18", "width": 6}},
    ]
    labels = [tiny_spec(teacher=teacher).teacher.label for teacher in specs]
    assert len(set(labels)) == 4 and labels[1] == f"{labels[0]}, share 0.9"
