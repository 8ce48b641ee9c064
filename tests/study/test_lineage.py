"""What was released is booked, whichever of its starts kept books, and what is booked already is not paid for twice."""

import itertools
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from helpers.tiny_study import PRIVATE, plan_of, run_plan, write_study
from trilemma.errors import Failure, UserError
from trilemma.privacy.ledger import Ledger
from trilemma.study import holdings, train_job
from trilemma.study.check import check_study
from trilemma.study.files import StoreFiles, load_tensors, save_tensors
from trilemma.study.holdings import release_of
from trilemma.study.ledgers import book_stored, check_books, create_books
from trilemma.study.lineage import Lineage, Payment
from trilemma.study.store import Store
from trilemma.study.workplace import Books, Workplace


class Hospital:
    """A study with one training, its books, and as many stores as are named."""

    def __init__(self, folder: Path, roots, noise: str):
        self.folder, self.roots = folder, roots
        self.plan = plan_of(write_study(folder, PRIVATE.replace("delta = 1e-3", f"delta = 1e-3, noise = '{noise}'")))
        create_books(self.plan, self.place("none"), folder / "books", 50.0, 1e-3)

    def place(self, store: str, books: bool = True, threads: int = 1) -> Workplace:
        kept = Books(self.folder / "books", "private") if books else None
        return Workplace(self.folder / store, self.roots, "cpu", threads, os.getpid(), kept)

    def run(self, store: str, books: bool = True) -> None:
        run_plan(self.plan, self.folder / store, self.roots, books=self.place(store, books).books)

    def books(self) -> list[Ledger]:
        return [Ledger.open(path) for path in sorted((self.folder / "books").iterdir())]

    def booked(self) -> list[list[int]]:
        """Steps of each booking, for each book."""
        return [[entry.events[0][2] for entry in book.entries] for book in self.books()]

    def checkpoint(self, store: str) -> Path:
        return StoreFiles(self.folder / store).checkpoint(self.plan.trainings[0].key)


@pytest.fixture
def fresh(tmp_path, roots):
    return Hospital(tmp_path, roots, "system")


@pytest.fixture
def seeded(tmp_path, roots):
    return Hospital(tmp_path, roots, "seeded")


@pytest.fixture
def dies(monkeypatch):
    """Lets the next training die in one of its rounds: `dies(2)` in the third."""
    real, moments = train_job.run_round, []

    def watched(federation, state):
        if state.round in moments:
            moments.clear()
            raise Failure("the machine", "lost its power", "Wait")
        return real(federation, state)

    monkeypatch.setattr(train_job, "run_round", watched)
    return moments.append


def dying_run(hospital: Hospital, store: str, books: bool = True) -> None:
    with pytest.raises(Failure, match="lost its power"):
        hospital.run(store, books)


def test_a_booking_pays_for_one_release_and_not_for_another_of_the_same_training(fresh):
    fresh.run("a")
    fresh.run("b", books=False)
    fresh.run("b")
    assert fresh.booked() == [[3, 3]] * 2
    for store in "abab":
        fresh.run(store)
    assert fresh.booked() == [[3, 3]] * 2
    one = fresh.books()[0]
    assert one.spent() > 1.3 * one.entries[0].epsilon_after


def test_rounds_that_ran_without_books_are_booked_on_resuming_with_them(fresh, dies):
    dies(2)
    dying_run(fresh, "a", books=False)
    fresh.run("a")
    assert fresh.booked() == [[3]] * 2
    fresh.run("a")
    assert fresh.booked() == [[3]] * 2


def test_rounds_that_ran_without_books_in_between_are_booked_too(fresh, dies):
    """The first round was paid for, the second not; of the third nobody knows whether it left."""
    dies(1)
    dying_run(fresh, "a")
    dies(2)
    dying_run(fresh, "a", books=False)
    fresh.run("a", books=False)
    fresh.run("a")
    assert fresh.booked() == [[3, 2]] * 2
    fresh.run("a")
    assert fresh.booked() == [[3, 2]] * 2


def test_a_seeded_run_of_other_code_is_booked_whenever_books_are_named(seeded, monkeypatch):
    seeded.run("a")
    with monkeypatch.context() as patched:
        patched.setattr(holdings, "_code", lambda: "another")
        seeded.run("b", books=False)
        seeded.run("c")
    assert seeded.booked() == [[3, 3]] * 2
    seeded.run("b")  # by now with the code of "a": what is stored is still the other code's
    assert seeded.booked() == [[3, 3]] * 2  # which "c" has paid for


def test_a_seeded_run_of_other_code_is_booked_though_nobody_else_did(seeded, monkeypatch):
    seeded.run("a")
    with monkeypatch.context() as patched:
        patched.setattr(holdings, "_code", lambda: "another")
        seeded.run("b", books=False)
    seeded.run("b")
    assert seeded.booked() == [[3, 3]] * 2
    for store in "ab":
        seeded.run(store)
    assert seeded.booked() == [[3, 3]] * 2


def test_a_seeded_repetition_costs_nothing_also_where_it_ran_without_books(seeded):
    seeded.run("a")
    seeded.run("b", books=False)
    seeded.run("b")
    assert seeded.booked() == [[3]] * 2


def test_rounds_of_two_versions_of_the_code_are_no_repetition_of_either(seeded, dies, monkeypatch):
    dies(1)
    dying_run(seeded, "a")
    monkeypatch.setattr(holdings, "_code", lambda: "another")
    seeded.run("a")  # one round of the old code, two of the new
    assert seeded.booked() == [[3, 2]] * 2
    seeded.run("b")  # all three of the new
    assert seeded.booked() == [[3, 2, 3]] * 2
    for store in "ab":
        seeded.run(store)
    assert seeded.booked() == [[3, 2, 3]] * 2


def test_a_seeded_run_killed_and_resumed_is_one_release_with_and_without_books(seeded, dies):
    dies(1)
    dying_run(seeded, "a", books=False)
    dies(2)
    dying_run(seeded, "a")
    seeded.run("a", books=False)
    seeded.run("a")
    assert seeded.booked() == [[3]] * 2


def test_a_book_put_back_from_an_old_copy_is_charged_for_what_it_forgot(fresh):
    path = fresh.books()[0].path
    before = path.read_bytes()
    fresh.run("a")
    path.write_bytes(before)
    assert fresh.booked() == [[], [3]]
    fresh.run("a")
    assert fresh.booked() == [[3], [3]]


def test_books_in_two_folders_each_pay_for_all(fresh, dies, tmp_path):
    dies(1)
    dying_run(fresh, "a")
    (tmp_path / "books").rename(tmp_path / "first")
    create_books(fresh.plan, fresh.place("none"), tmp_path / "books", 50.0, 1e-3)
    fresh.run("a")
    assert fresh.booked() == [[3]] * 2
    (tmp_path / "books").rename(tmp_path / "second")
    (tmp_path / "first").rename(tmp_path / "books")
    assert fresh.booked() == [[3]] * 2  # of which one round was used
    fresh.run("a")
    assert fresh.booked() == [[3, 2]] * 2
    (tmp_path / "books").rename(tmp_path / "first")
    (tmp_path / "second").rename(tmp_path / "books")
    fresh.run("a")
    assert fresh.booked() == [[3]] * 2


def test_a_checkpoint_of_an_older_version_counts_as_not_booked(seeded, dies):
    dies(1)
    dying_run(seeded, "a")
    tensors, texts = load_tensors(seeded.checkpoint("a"))
    assert Lineage.parse(texts.pop("lineage")) != Lineage()
    save_tensors(seeded.checkpoint("a"), tensors, texts)
    seeded.run("a")
    assert seeded.booked() == [[3, 3]] * 2


def test_a_stored_training_of_an_older_version_counts_as_not_booked(fresh, tmp_path):
    fresh.run("a")
    key = fresh.plan.trainings[0].key
    with Store(tmp_path / "a", write=True) as store:
        assert store.run(key).lineage.bookings
        store.note_lineage(key, Lineage())
    fresh.run("a")
    assert fresh.booked() == [[3, 3]] * 2


def test_what_is_stored_is_booked_as_it_ran(fresh, tmp_path):
    """A later version may calibrate other noise to the same spec; what ran, ran with what the guarantee says."""
    fresh.run("a", books=False)
    (training,), place = fresh.plan.trainings, fresh.place("a")
    with Store(tmp_path / "a") as store:
        row = store.run(training.key)
    less = {name: (event.model_copy(update={"noise_multiplier": 1.5}),) for name, (event,) in _events(row).items()}
    row = replace(row, guarantee=row.guarantee.model_copy(update={"events_by_client": less}))
    ((key, lineage),) = book_stored(check_books(fresh.plan, {training.key: row}, place), {training.key: row})
    assert key == training.key and {sum(paid.values()) for paid in lineage.bookings.values()} == {3}
    assert [book.entries[0].events[0][0] for book in fresh.books()] == [1.5, 1.5]


def _events(row):
    return row.guarantee.events_by_client


def test_killed_between_book_and_row_a_stored_training_is_booked_again(fresh, monkeypatch):
    fresh.run("a", books=False)
    with monkeypatch.context() as patched:
        patched.setattr(Store, "note_lineage", lambda *_: (_ for _ in ()).throw(Failure("the disk", "broke", "Wait")))
        with pytest.raises(Failure, match="broke"):
            fresh.run("a")
    fresh.run("a")
    assert fresh.booked() == [[3, 3]] * 2


def test_a_check_asks_for_what_the_run_will_book(seeded, dies, roots, tmp_path):
    """A run on four threads is another release than one on one thread, for `check` as for `run`."""
    cost = _cost(seeded)
    for book in seeded.books():
        book.path.unlink()
        Ledger.create(book.path, book.terms.model_copy(update={"epsilon": 1.05 * cost}))
    (training,), place = seeded.plan.trainings, seeded.place("a", threads=4)
    dies(1)
    with pytest.raises(Failure, match="lost its power"):
        train_job.train_job(place, training)
    torch.set_num_threads(1)
    arguments = (seeded.plan, tmp_path / "a", roots)
    check_study(*arguments, Console(quiet=True), tmp_path / "books", threads=4)
    with pytest.raises(UserError, match="would be overdrawn"):
        check_study(*arguments, Console(quiet=True), tmp_path / "books", threads=1)


def _cost(hospital: Hospital) -> float:
    (training,) = hospital.plan.trainings
    hospital.run("elsewhere", books=False)
    with Store(hospital.folder / "elsewhere") as store:
        return store.run(training.key).guarantee.epsilon


def test_on_cuda_no_two_runs_are_one_release(seeded):
    """Some of its sums are not made in the same order twice."""
    (training,), place = seeded.plan.trainings, seeded.place("a")
    dataset = place.dataset(training.spec.data)
    assert release_of(place, training, dataset) is not None
    assert release_of(replace(place, device="cuda"), training, dataset) is None


def test_a_lineage_knows_how_many_steps_each_booking_paid_for():
    empty = Lineage("r")
    first = empty.after((Payment("north", "pool", "x", 0), Payment("south", "pool", "y", 0)), {"pool": 2})
    assert first.bookings == {"north": {"x": 2}, "south": {"y": 2}} and first.release == "r"
    second = first.after((Payment("north", "pool", "z", 2),), {"pool": 5})
    assert second.bookings == {"north": {"x": 2, "z": 3}, "south": {"y": 2}}
    assert second.after((), {"pool": 9}) == second
    assert second.after((Payment("north", "pool", "x", 3),), {"pool": 6}).bookings["north"] == {"x": 3, "z": 3}
    assert Lineage.parse(second.text()) == second and Lineage.parse("{}") == Lineage()


def test_no_history_of_starts_shows_less_than_was_released(roots, tmp_path_factory, monkeypatch):
    """Random starts of two stores, killed at random, with and without books, under two versions of the code.

    The rounds are of a toy whose "weights" say from which weights, code and noise they came: two that are equal are one
    release, others are not. In the end both stores are run with books, which then hold at least as many steps as there
    were different results among all rounds of starts with books and all that are in a store.
    """
    draws = itertools.count(1)
    version = ["one"]
    monkeypatch.setattr(holdings, "_code", lambda: version[0])

    starts = st.lists(
        st.tuples(st.sampled_from("ab"), st.booleans(), st.sampled_from(["one", "two"]), st.integers(0, 3)), max_size=6
    )

    @settings(deadline=None, max_examples=25)
    @given(st.sampled_from(["seeded", "system"]), starts)
    def holds(noise, history):
        hospital = Hospital(tmp_path_factory.mktemp("history"), roots, noise)
        paid, lines, last = set(), {"a": [], "b": []}, {}
        (training,) = hospital.plan.trainings
        ends = [("a", True, "one", 3), ("b", True, "one", 3)]
        for store, books, code, rounds in [*history, *ends]:
            version[0] = code

            begun: list[int] = []

            def toy(federation, state, store=store, books=books, code=code, rounds=rounds, begun=begun):
                begun.append(state.round)
                result = hash((float(state.params_P[0]), code if noise == "seeded" else next(draws))) % 2**20
                if books:
                    paid.add((state.round, result))  # it may have left even if the process is killed now
                if len(begun) > rounds:
                    raise Failure("the machine", "lost its power", "Wait")
                steps = {client.name: state.private_steps.get(client.name, 0) + 1 for client in federation.clients}
                lines[store] = [*lines[store][: state.round], (state.round, result)]
                params_P = torch.full_like(state.params_P, float(result))
                return replace(state, round=state.round + 1, params_P=params_P, private_steps=steps)

            monkeypatch.setattr(train_job, "run_round", toy)
            last[store] = _start(hospital, training, store, books)
        released = paid | {one for line in lines.values() for one in line}
        assert all(len(line) == 3 for line in lines.values()) and last == {"a": True, "b": True}
        for steps in hospital.booked():
            assert sum(steps) >= len(released), (Counter(steps), released)
        before = hospital.booked()
        for store in "ab":
            _start(hospital, training, store, True)
        assert hospital.booked() == before

    holds()


def _start(hospital: Hospital, training, store: str, books: bool) -> bool:
    """One start of the study as far as its trainings go; True if it is done."""
    place = hospital.place(store, books)
    with Store(place.folder, write=True) as opened:
        if books:
            rows = opened.runs([training.key])
            for key, lineage in book_stored(check_books(hospital.plan, rows, place), rows):
                opened.note_lineage(key, lineage)
        if not opened.keys("runs"):
            try:
                opened.add_run(train_job.train_job(place, training))
            except Failure:
                return False
            place.files.discard_checkpoint(training.key)
    return True
