"""A study whose hospitals train a teacher first: what is stored, resumed, counted, charged, shown and refused."""

import io

import pytest
import torch
from rich.console import Console

from helpers.tiny_study import PRIVATE, SMALLEST, plan_of, rows_of, run_plan, write_study
from trilemma.errors import Failure
from trilemma.federation.early_stopping import ended
from trilemma.federation.round import run_round
from trilemma.federation.training import initial_state, planned_events, prepare, taught
from trilemma.privacy.accounting import epsilon
from trilemma.privacy.ledger import Ledger
from trilemma.report.configurations import configuration_rows
from trilemma.report.html import report_html
from trilemma.study import train_job
from trilemma.study.assemble import assemble
from trilemma.study.check import check_study
from trilemma.study.files import StoreFiles, load_tensors, save_tensors
from trilemma.study.progress import _rounds
from trilemma.study.store import Store
from trilemma.study.work import Job
from trilemma.study.workplace import Books

TEACHER = 'base.teacher = { model = { kind = "resnet9", width = 6 }, rounds = 2 }\n'
STUDY = SMALLEST.replace("base.rounds = 1", "base.rounds = 3") + TEACHER
PUBLIC = 'base.pretraining.data = { kind = "phantom", size = 16, train = 20, val = 8, test = 8, sites = 1, seed = 5 }\n'
ROUNDS = 5


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_of(write_study(tmp_path_factory.mktemp("study"), STUDY))


@pytest.fixture(scope="module")
def stored(plan, roots, tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught")
    run_plan(plan, folder, roots)
    return folder


def weights(folder, training) -> bytes:
    return StoreFiles(folder).weights(training.key).read_bytes()


def stops_at(monkeypatch, stop: int, seen: list | None = None) -> None:
    """Lets the run fail as soon as so many rounds, of both phases together, have ended; once."""
    done, stopped = [0], []

    def dies(federation, state):
        if done[0] == stop and not stopped:
            stopped.append(1)
            raise Failure("the machine", "lost its power", "Wait")
        done[0] += 1
        after = run_round(federation, state)
        if seen is not None:
            seen.append((federation.teacher is None, after.round))
        return after

    monkeypatch.setattr(train_job, "run_round", dies)


def test_what_is_stored_is_the_student(plan, stored, roots):
    (training,) = plan.trainings
    spec = training.spec
    federation = prepare(spec, spec.data.load(roots), torch.device("cpu"))
    learnt = initial_state(federation.teacher)
    while not ended(federation.teacher.spec, learnt):
        learnt = run_round(federation.teacher, learnt)
    federation = taught(federation, learnt)
    state = initial_state(federation)
    while not ended(spec, state):
        state = run_round(federation, state)
    tensors, _ = load_tensors(StoreFiles(stored).weights(training.key))
    assert torch.equal(tensors["params"], state.model_P)
    with Store(stored) as store:
        run = store.run(training.key)
    assert [row["round"] for row in run.history] == [1, 2, 3] and run.num_parameters == state.params_P.numel()
    assert run.seconds > sum(row["seconds"] for row in run.history)
    files = StoreFiles(stored)
    assert not list(files.teacher(training.key).parent.iterdir())


@pytest.mark.parametrize(("stop", "public"), [(0, ""), (1, ""), (2, ""), (4, ""), (0, PUBLIC), (2, PUBLIC)])
def test_killed_in_either_phase_it_goes_on_bit_for_bit(stop, public, plan, stored, roots, tmp_path, monkeypatch):
    if public:
        plan, stored = plan_of(write_study(tmp_path, STUDY + public)), tmp_path / "undisturbed"
        run_plan(plan, stored, roots)
    (training,) = plan.trainings
    folder, seen = tmp_path / "store", []
    files = StoreFiles(folder)
    stops_at(monkeypatch, stop, seen)
    with pytest.raises(Failure, match="lost its power"):
        run_plan(plan, folder, roots)
    assert files.teacher(training.key).exists() == (stop > 0 or bool(public))
    assert files.checkpoint(training.key).exists() == (stop > 2 or (stop == 2 and bool(public)))
    if stop:
        assert int(files.progress(training.key).read_text()) == stop
    run_plan(plan, folder, roots)
    assert seen == [(True, 1), (True, 2), (False, 1), (False, 2), (False, 3)]  # no round twice
    assert rows_of(folder)["runs"] == rows_of(stored)["runs"]
    assert weights(folder, training) == weights(stored, training)
    assert not files.teacher(training.key).exists() and not files.checkpoint(training.key).exists()


def test_progress_counts_the_rounds_of_both(plan):
    (training,) = plan.trainings
    assert _rounds(Job("train", training.key, train_job.train_job, (training,))) == ROUNDS


def killed(plan, folder, roots, monkeypatch, stop):
    stops_at(monkeypatch, stop)
    with pytest.raises(Failure, match="lost its power"):
        run_plan(plan, folder, roots)
    return StoreFiles(folder), plan.trainings[0].key


def test_a_student_does_not_go_on_with_another_teacher(plan, roots, tmp_path, monkeypatch):
    files, key = killed(plan, tmp_path, roots, monkeypatch, 3)
    tensors, texts = load_tensors(files.teacher(key))
    whole = files.teacher(key).read_bytes()
    save_tensors(files.teacher(key), {**tensors, "params": tensors["params"] * 1.01}, texts)
    with pytest.raises(Failure, match="learnt from another teacher.*Put .*teacher.safetensors back"):
        run_plan(plan, tmp_path, roots)
    files.teacher(key).unlink()
    with pytest.raises(Failure, match="learnt from another teacher"):
        run_plan(plan, tmp_path, roots)
    files.teacher(key).write_bytes(whole)
    run_plan(plan, tmp_path, roots)
    assert rows_of(tmp_path)["runs"]


@pytest.mark.parametrize("damage", ["bytes", "weights", "rounds", "nothing", "images"])
def test_a_damaged_teacher_is_told_and_never_a_traceback(damage, plan, stored, roots, tmp_path, monkeypatch):
    files, key = killed(plan, tmp_path, roots, monkeypatch, 1)
    path = files.teacher(key)
    tensors, texts = load_tensors(path)
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "weights":
        save_tensors(path, {**tensors, "params": tensors["params"][:-1]}, texts)
    elif damage == "rounds":
        save_tensors(path, tensors, {**texts, "round": "7"})
    elif damage == "images":
        save_tensors(path, tensors, {**texts, "fingerprint": "others"})
    else:
        save_tensors(path, {"x": torch.zeros(1)}, {"fingerprint": texts["fingerprint"]})
    with pytest.raises(Failure, match=r"teacher\.safetensors.*[Dd]elete"):
        run_plan(plan, tmp_path, roots)
    path.unlink()
    run_plan(plan, tmp_path, roots)  # anew
    assert rows_of(tmp_path)["runs"] == rows_of(stored)["runs"]


def test_the_history_tells_of_the_teacher_and_the_report_counts_its_bytes(plan, stored, trilemma):
    with Store(stored) as store:
        results = assemble(plan, store, "", "")
        run = store.run(plan.trainings[0].key)
    first, *others = run.history
    teacher = first["teacher"]
    assert teacher["rounds"] == 2 and 0 <= teacher["val_accuracy"] <= 1
    assert not any("teacher" in row for row in others)
    network = plan.trainings[0].spec.teacher.model.make(1, 16, 2, 0)
    width_6 = 4 * sum(parameter.numel() for parameter in network.parameters())
    assert teacher["bytes_up"] == 2 * 2 * width_6  # two hospitals, two rounds, float32
    assert teacher["bytes_down"] == 2 * 2 * width_6 + 2 * width_6  # and the finished teacher for each of them
    own = sum(row["bytes_up"] + row["bytes_down"] for row in run.history)
    (row,) = configuration_rows(results)
    assert row.traffic.total.value == own + teacher["bytes_up"] + teacher["bytes_down"]
    assert "<html" in report_html(results)
    code, shown, _ = trilemma("show", plan.trainings[0].key, "--store", stored)
    told = f"bytes_down {teacher['bytes_down']}, bytes_up {teacher['bytes_up']}, rounds 2, val_accuracy"
    assert code == 0 and f"its teacher, trained before: {told}" in shown


@pytest.mark.parametrize(("algorithm", "crosses"), [("centralised", True), ("local_only", False)])
def test_pooled_images_cross_the_network_once_for_both_phases(algorithm, crosses, tmp_path, roots):
    study = plan_of(write_study(tmp_path, SMALLEST + TEACHER), f"base.algorithm={{kind='{algorithm}'}}")
    run_plan(study, tmp_path / "store", roots)
    with Store(tmp_path / "store") as store:
        first, *_ = store.run(study.trainings[0].key).history
    pooled = 24 * 16 * 16 if crosses else 0  # all training images, a byte a pixel
    assert (first["bytes_up"], first["teacher"]["bytes_up"]) == (0, pooled)
    assert first["bytes_down"] == first["teacher"]["bytes_down"] == 0


TAUGHT = PRIVATE + TEACHER


def budget_of(tmp_path, trilemma, study):
    code, _, err = trilemma("ledger", "create", tmp_path / "books", "--study", study, "--epsilon", 50, "--delta", 1e-3)
    assert (code, err) == (0, "")
    return Books(tmp_path / "books", "private")


@pytest.mark.parametrize(
    ("stop", "noise"), [(None, "seeded"), (1, "seeded"), (3, "seeded"), (1, "system"), (2, "system"), (4, "system")]
)
def test_the_books_are_charged_for_both_phases_and_never_less(stop, noise, tmp_path, trilemma, monkeypatch, roots):
    study = write_study(tmp_path, TAUGHT.replace("delta = 1e-3", f'delta = 1e-3, noise = "{noise}"'))
    monkeypatch.setenv("TRILEMMA_CACHE", str(roots.cache))
    plan = plan_of(study)
    books = budget_of(tmp_path, trilemma, study)
    if stop is not None:
        stops_at(monkeypatch, stop)
        with pytest.raises(Failure, match="lost its power"):
            run_plan(plan, tmp_path / "store", roots, books=books)
        assert charged(tmp_path) == [ROUNDS] * 2  # all of both, before anything ran
    run_plan(plan, tmp_path / "store", roots, books=books)
    # A round that was under way may have left the hospital: with other noise what is left is booked anew.
    again = 0 if noise == "seeded" or stop is None else ROUNDS - stop
    assert charged(tmp_path) == [ROUNDS + again] * 2
    (training,) = plan.trainings
    with Store(tmp_path / "store") as store:
        run = store.run(training.key)
    federation = prepare(training.spec, training.spec.data.load(roots), torch.device("cpu"))
    assert run.guarantee.events_by_client == planned_events(federation)
    assert {event.steps for (event,) in run.guarantee.events_by_client.values()} == {ROUNDS}
    before = charged(tmp_path)
    run_plan(plan, tmp_path / "store", roots, books=books)  # stored: costs nothing more
    assert charged(tmp_path) == before


def charged(tmp_path) -> list[int]:
    books = [Ledger.open(path) for path in sorted((tmp_path / "books").glob("*.jsonl"))]
    return [sum(event.steps for event in book.events) for book in books]


def test_a_check_refuses_what_only_both_phases_together_overdraw(tmp_path, trilemma, roots, monkeypatch):
    monkeypatch.setenv("TRILEMMA_CACHE", str(roots.cache))
    study = write_study(tmp_path, TAUGHT)
    plan, alone = plan_of(study), plan_of(write_study(tmp_path, PRIVATE, "alone.toml"))

    def cost(of):
        spec = of.trainings[0].spec
        federation = prepare(spec, spec.data.load(roots), torch.device("cpu"))
        return max(epsilon(events, 1e-3) for events in planned_events(federation).values())

    between = (cost(plan) + cost(alone)) / 2
    assert cost(alone) < between < cost(plan)
    create = ("ledger", "create", tmp_path / "books", "--study", study, "--epsilon", between, "--delta", 1e-3)
    assert trilemma(*create)[0] == 0
    where = ("--store", tmp_path / "store", "--ledgers", tmp_path / "books")
    code, _, err = trilemma("check", study, *where)
    assert code == 2 and "overdrawn" in err
    code, out, _ = trilemma("check", tmp_path / "alone.toml", *where)
    assert code == 0 and "allow all of it" in out


def test_where_it_is_secret_who_took_part_the_teachers_word_tells_no_bytes(roots, tmp_path):
    secret = TAUGHT.replace("delta = 1e-3", 'delta = 1e-3, unit = "client", trust = "central"')
    plan = plan_of(write_study(tmp_path, secret))
    run_plan(plan, tmp_path / "store", roots)
    with Store(tmp_path / "store") as store:
        run = store.run(plan.trainings[0].key)
    assert run.history[0]["teacher"].keys() == {"rounds", "val_accuracy"}


def test_a_check_trains_nothing(plan, roots, tmp_path, monkeypatch):
    monkeypatch.setattr(train_job, "run_round", lambda *_: pytest.fail("it trains"))
    check_study(plan, tmp_path, roots, Console(file=io.StringIO(), width=300))
