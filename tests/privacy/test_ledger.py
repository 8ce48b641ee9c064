"""The budget book never shows less than was released, never more than its budget, and notices what was done to it."""

import errno
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.ledger_crashes import DELTA, event, request, terms
from trilemma.errors import Failure, UserError
from trilemma.privacy.accounting import epsilon
from trilemma.privacy.affordable import least_noise, merged, most_steps, total
from trilemma.privacy.ledger import Ledger, book_all, down, up
from trilemma.privacy.ledger_file import sealed

SCRIPT = Path(__file__).parent.parent / "helpers" / "ledger_crashes.py"


@pytest.fixture
def book(tmp_path) -> Ledger:
    """An unspent book with room for anything."""
    return Ledger.create(tmp_path / "north.jsonl", terms())


def in_a_process(*arguments: object) -> list[int]:
    """Runs the crash script, which checks the books itself, and returns the numbers that it prints."""
    done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


# What it says.


def test_a_new_book_has_spent_nothing(book):
    assert book.entries == () and book.spent() == 0.0 and book.left == 1e4
    assert Ledger.open(book.path) == book


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.booleans()), max_size=6))
def test_it_shows_all_releases_composed_and_repeats_once(tmp_path_factory, wanted):
    """Each run asks for a training of n steps; seeded ones repeat themselves, others release anew."""
    path = tmp_path_factory.mktemp("book") / "b.jsonl"
    Ledger.create(path, terms())
    released: dict[object, int] = {}
    for number, (training, steps, seeded) in enumerate(wanted):
        name = f"{training}-{steps}"
        after = Ledger.open(path).book(request(name, event(steps), release=name if seeded else None))
        released[name if seeded else number] = steps
        assert len(after.entries) == len(released)
    book = Ledger.open(path)
    assert book.spent() == pytest.approx(total([event(n) for n in released.values()], delta=DELTA), abs=1e-12)
    assert book.spent() >= epsilon([event(sum(released.values()))] if released else [], DELTA)
    assert book.content.torn == 0


def test_events_of_different_kinds_compose(book):
    """By the accountant, and by no addition of epsilons."""
    book.book(request("a", event(50, 2.0, 0.1)))
    after = book.book(request("b", event(30, 1.5, 0.05), event(10, 2.0, 0.1)))
    assert after.spent() == epsilon([event(30, 1.5, 0.05), event(60, 2.0, 0.1)], DELTA)
    parts = epsilon([event(50, 2.0, 0.1)], DELTA) + total([event(30, 1.5, 0.05), event(10, 2.0, 0.1)], delta=DELTA)
    assert after.spent() < 0.9 * parts
    assert after.entries[-1].epsilon_after == after.spent() and after.left == 1e4 - after.spent()


def test_merging_keeps_steps_apart_that_are_not_alike():
    assert merged([event(1), event(2), event(0), event(3, rate=0.5)]) == (event(3, rate=0.5), event(3))
    assert total([event(4)], [event(5)], delta=DELTA) == epsilon([event(9)], DELTA)


def test_the_same_training_with_other_events_or_another_release_is_charged(book):
    book.book(request("a", event(1), release="r"))
    assert not book.book(request("a", event(1), release="r")).charges(request("a", event(1), release="r"))
    after = Ledger.open(book.path)
    assert len(after.entries) == 1 and after.holds(after.entries[0].id) and not after.holds("")
    for other in (("a", event(2), "r"), ("a", event(1, noise=301.0), "r"), ("a", event(1), "s"), ("b", event(1), "r")):
        assert after.charges(request(*other[:2], release=other[2]))
    assert after.charges(request("a", event(1), release=None))


def test_a_booking_has_an_id_of_its_own_in_all_books_at_once(tmp_path):
    paths = [Ledger.create(tmp_path / f"{name}.jsonl", terms(owner=name)).path for name in "ab"]
    asked = dict.fromkeys(paths, request("t", event(1)))
    first, second = book_all(asked), book_all(asked)
    assert len(set(first.values())) == len(set(second.values())) == 1 and first != second
    for path in paths:
        book = Ledger.open(path)
        assert [entry.id for entry in book.entries] == [first[path], second[path]]
        assert book.holds(first[path]) and not book.holds("another")


def test_a_line_without_an_id_counts_and_is_taken_for_nobodys(book):
    """It says what was spent, and not for which of several equal releases."""
    entry = {"kind": "book", "time": "", "training": "a", "study": "s", "events": [[300.0, 1.0, 1]], "release": "r"}
    rewritten(book.path, terms().model_dump(mode="json"), {**entry, "epsilon_after": 1.0})
    old = Ledger.open(book.path)
    assert old.spent() == total([event(1)], delta=DELTA) and not old.holds("")
    assert len(old.book(request("a", event(1), release="r")).entries) == 2


def test_what_is_shown_never_says_less_spent_or_more_left():
    assert (up(1.001), down(1.009), up(2.0), down(2.0)) == ("1.01", "1.00", "2.00", "2.00")
    assert up(float("inf")) == "inf"


# Overdraws.


def tight(tmp_path, spare: float) -> tuple[Ledger, float]:
    """A book on which 40 steps are booked and in which `spare` times their epsilon is still free."""
    cost = epsilon([event(40, 15.0)], DELTA)
    book = Ledger.create(tmp_path / "tight.jsonl", terms(epsilon=cost * (1 + spare)))
    return book.book(request("first", event(40, 15.0))), cost


def test_a_budget_can_be_spent_to_the_last(tmp_path):
    book, cost = tight(tmp_path, 0.0)
    assert book.spent() == cost and book.left == 0.0
    with pytest.raises(UserError, match="overdrawn"):
        book.book(request("more", event(1, 15.0)))


def test_the_offer_of_a_refusal_fits_and_one_step_more_does_not(tmp_path):
    book, _ = tight(tmp_path, 0.3)
    before = book.path.read_bytes()
    with pytest.raises(UserError) as refused:
        book.book(request("big", event(60, 15.0)))
    assert refused.value.exit_code == 2 and book.path.read_bytes() == before
    said = str(refused.value)
    for part in (str(book.path), "'north'", f"{up(book.spent())} is spent", f"{down(book.left)} left", "60 steps"):
        assert part in said, part
    steps = int(re.search(r"(\d+) of the 60 steps", said)[1])
    noise = float(re.search(r"all 60 steps with noise multiplier (\d+\.?\d*)\b", said)[1])
    assert 0 < steps < 60 and noise > 15
    assert book.spent(event(steps, 15.0)) <= book.terms.epsilon < book.spent(event(steps + 1, 15.0))
    assert book.spent(event(60, noise)) <= book.terms.epsilon < book.spent(event(60, 0.995 * noise))
    assert book.book(request("noisier", event(60, noise))).left < 0.01 * book.terms.epsilon


def test_where_nothing_fits_it_says_so(tmp_path):
    book, _ = tight(tmp_path, 0.0)
    with pytest.raises(UserError, match="Nothing of it would fit, however noisy"):
        book.book(request("more", event(3000, 15.0)))


def test_several_events_are_shortened_in_proportion():
    asked = (event(40, 2.0, 0.1), event(20, 4.0, 0.1))
    budget = 0.6 * total(asked, delta=DELTA)
    short, long = most_steps((), asked, DELTA, budget), most_steps((), asked, DELTA, 2 * budget)
    assert long == asked and short[0].steps == 2 * short[1].steps > 0
    more = (event(short[0].steps + 2, 2.0, 0.1), event(short[1].steps + 1, 4.0, 0.1))
    assert total(short, delta=DELTA) <= budget < total(more, delta=DELTA)
    noisier = least_noise((), asked, DELTA, budget)
    assert total(noisier, delta=DELTA) <= budget
    assert noisier[1].noise_multiplier == pytest.approx(2 * noisier[0].noise_multiplier, abs=2e-3)


def test_no_noise_is_refused_and_not_a_defect(book):
    with pytest.raises(UserError, match="overdrawn"):
        book.book(request("bare", event(3, noise=0.0)))


def test_all_hospitals_or_none(tmp_path):
    poor, rich = tight(tmp_path, 0.01)[0], Ledger.create(tmp_path / "a.jsonl", terms(owner="south"))
    before = rich.path.read_bytes(), poor.path.read_bytes()
    big = request("big", event(20, 15.0))
    with pytest.raises(UserError, match="'north' would be overdrawn"):
        book_all({rich.path: big, poor.path: big})
    assert (rich.path.read_bytes(), poor.path.read_bytes()) == before
    with pytest.raises(UserError, match="there is no ledger here"):
        book_all({rich.path: big, tmp_path / "z.jsonl": big})
    assert rich.path.read_bytes() == before[0]
    ids = book_all({rich.path: big, tmp_path / "a.jsonl": big})
    assert [entry.id for entry in Ledger.open(rich.path).entries] == list(ids.values())


def test_two_names_of_one_book_do_not_wait_for_each_other(book, tmp_path):
    (tmp_path / "south.jsonl").hardlink_to(book.path)
    both = request("a", event(1))
    with pytest.raises(UserError, match="is the same file as"):
        book_all({book.path: both, tmp_path / "south.jsonl": both})
    assert Ledger.open(book.path).entries == ()


# Processes.


def test_nothing_released_is_missing_at_100_random_crash_points(tmp_path):
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)  # shown if it fails
    released, midst = in_a_process("random", tmp_path, seed)
    assert released >= 5 and midst >= 5


def test_nothing_released_is_missing_at_any_step(tmp_path):
    (points,) = in_a_process("steps", tmp_path)
    assert points >= 20


def test_two_processes_cannot_both_spend_the_last_of_it(tmp_path):
    assert set(in_a_process("race", tmp_path)) == {1}


def test_the_race_is_one_that_a_book_without_a_lock_loses(tmp_path):
    assert 2 in in_a_process("race", tmp_path, "unlocked")


# Damage.


def filled(tmp_path) -> Ledger:
    book = Ledger.create(tmp_path / "north.jsonl", terms())
    for number in range(3):
        book = book.book(request(f"t{number}", event(number + 1)))
    return book


@pytest.fixture(scope="module")
def full_book(tmp_path_factory) -> Ledger:
    """For tests that do not write to it."""
    return filled(tmp_path_factory.mktemp("full"))


def test_cut_off_anywhere_in_its_last_line_it_goes_on(tmp_path):
    book = filled(tmp_path)
    content = book.path.read_bytes()
    start = content.rstrip(b"\n").rindex(b"\n") + 1
    for size in range(start, len(content) + 1):
        book.path.write_bytes(content[:size])
        found = Ledger.open(book.path)
        whole = size >= len(content) - 1  # with or without the end of line
        assert len(found.entries) == (3 if whole else 2)
        assert found.content.torn == (0 if whole else size - start)
    for size in (start + 7, len(content) - 1):
        book.path.write_bytes(content[:size])
        after = Ledger.open(book.path).book(request("next", event(1)))
        assert [e.training for e in after.entries][-1] == "next" and after.content.torn == 0
        assert after.path.read_bytes().count(b"\n") == 1 + len(after.entries)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_changed_byte_is_noticed_and_its_line_named(full_book, data):
    content = full_book.path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != content[place]))
    path = full_book.path.with_name("broken.jsonl")
    path.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
    line = content[:place].count(b"\n") + 1
    with pytest.raises((Failure, UserError)) as noticed:
        Ledger.open(path)
    if isinstance(noticed.value, Failure):
        assert f"broken.jsonl: line {line}" in str(noticed.value) or b"\n" in (
            bytes([byte]),
            content[place : place + 1],
        )
    else:
        assert "is a ledger of version" in str(noticed.value)


@pytest.mark.parametrize(("change", "line"), [
    (lambda lines: lines[:1] + lines[2:], 2),
    (lambda lines: [lines[0], lines[2], lines[1], lines[3]], 2),
    (lambda lines: [*lines, lines[3]], 5),
    (lambda lines: lines[1:], 1),
    (lambda lines: [lines[0], lines[1] + b" ", *lines[2:]], 2),
    (lambda lines: [lines[0], b"", *lines[1:]], 2),
    (lambda lines: [lines[0], *lines], 2),
])  # fmt: skip
def test_lines_taken_out_moved_or_put_in_are_noticed(tmp_path, change, line):
    book = filled(tmp_path)
    book.path.write_bytes(b"".join(one + b"\n" for one in change(book.path.read_bytes().splitlines())))
    for use in (Ledger.open, lambda path: book_all({path: request("next", event(1))})):
        with pytest.raises(Failure, match=rf"north.jsonl: line {line}: .*Put the file back from a copy"):
            use(book.path)


def test_a_byte_that_makes_a_number_infinite_is_noticed(book):
    book.path.write_bytes(book.path.read_bytes().replace(b"1e-05", b"1e405"))
    with pytest.raises(Failure, match="north.jsonl: line 1: was changed"):
        Ledger.open(book.path)


def test_lines_cut_off_the_end_are_noticed_by_whoever_noted_the_seal(tmp_path):
    book = filled(tmp_path)
    cut = b"".join(book.path.read_bytes().splitlines(keepends=True)[:-1])
    book.path.write_bytes(cut)
    after = Ledger.open(book.path)
    assert len(after.entries) == 2 and book.content.head not in after.content.seals
    assert after.content.head in book.content.seals


def rewritten(path: Path, *lines: dict) -> None:
    """A book with right seals, whatever it says."""
    head, text = "", b""
    for line in lines:
        one, head = sealed(line, head)
        text += one + b"\n"
    path.write_bytes(text)


def test_what_a_book_says_must_make_sense(book):
    first = terms().model_dump(mode="json")
    entry = {"kind": "book", "time": "", "training": "t", "study": "s", "events": [[1.0, 0.1, 5]], "release": None}
    entry["epsilon_after"] = 1.0
    rewritten(book.path, first, entry)
    assert Ledger.open(book.path).events == (event(5, 1.0, 0.1),)
    for field, value in (("events", [[-1.0, 0.1, 5]]), ("events", [[1.0, 1.1, 5]]), ("events", [[1.0, 0.1, -5]])):
        rewritten(book.path, first, {**entry, field: value})
        with pytest.raises(Failure, match="line 2: cannot be understood"):
            Ledger.open(book.path)
    rewritten(book.path, first, {**entry, "more": 1})
    with pytest.raises(Failure, match="line 2: cannot be understood"):
        Ledger.open(book.path)
    rewritten(book.path, entry)
    with pytest.raises(Failure, match="line 1: is out of place"):
        Ledger.open(book.path)


def test_a_newer_version_is_refused_and_left_as_it_is(book):
    rewritten(book.path, {**terms().model_dump(mode="json"), "version": 2, "news": True})
    before = book.path.read_bytes()
    with pytest.raises(UserError, match="is a ledger of version 2; this Trilemma reads 1. Update Trilemma"):
        book.book(request("a", event(1)))
    assert book.path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b'{"created": "20'])
def test_a_book_that_was_never_finished_says_what_to_do(tmp_path, content):
    path = tmp_path / "b.jsonl"
    path.write_bytes(content)
    with pytest.raises(Failure, match="holds no whole first line.*delete it and create it anew"):
        Ledger.open(path)
    with pytest.raises(UserError, match="is there already"):
        Ledger.create(path, terms())


def test_missing_and_unreadable_books(tmp_path):
    with pytest.raises(UserError, match="there is no ledger here. Create .*trilemma ledger create"):
        Ledger.open(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(Failure, match="could not be read"):
        Ledger.open(tmp_path / "folder.jsonl")


def test_a_book_replaced_while_waiting_for_its_lock_is_not_used(book, monkeypatch):
    def replace(*_):
        other = book.path.with_name("other")
        other.write_bytes(book.path.read_bytes())
        other.replace(book.path)

    monkeypatch.setattr("fcntl.flock", replace)
    with pytest.raises(Failure, match="was replaced by another file meanwhile"):
        book.book(request("a", event(1)))


# Disks.


def test_a_full_disk_leaves_the_book_as_it_was(book):
    book = book.book(request("a", event(1)))
    before = book.path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, old[1]))  # part of a line still fits
    try:
        with pytest.raises(Failure, match="could not be written.*Free some space"):
            book.book(request("b", event(1)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert book.path.read_bytes() == before
    assert len(book.book(request("b", event(1))).entries) == 2


def test_a_disk_that_fills_between_two_hospitals_costs_nothing_twice(tmp_path, monkeypatch):
    paths = [Ledger.create(tmp_path / f"{name}.jsonl", terms(owner=name)).path for name in "ab"]
    same, write, calls = request("t", event(1), release="r"), os.write, iter([False, True])

    def full_at_the_second(file, data):
        if next(calls):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    with monkeypatch.context() as patched:
        patched.setattr("os.write", full_at_the_second)
        with pytest.raises(Failure, match="Free some space"):
            book_all(dict.fromkeys(paths, same))
    assert [len(Ledger.open(path).entries) for path in paths] == [1, 0]
    ids = book_all(dict.fromkeys(paths, same))
    assert [[entry.id for entry in Ledger.open(path).entries] for path in paths] == [[one] for one in ids.values()]
    assert len(set(ids.values())) == 2 and book_all(dict.fromkeys(paths, same)) == ids


def test_a_line_that_may_not_be_on_the_disk_is_not_booked(book, monkeypatch):
    before = book.path.read_bytes()

    def broken(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", broken)
        with pytest.raises(Failure, match="could not be written"):
            book.book(request("a", event(1)))
        with pytest.raises(Failure, match="could not be written"):
            Ledger.create(book.path.with_name("new.jsonl"), terms())
    assert book.path.read_bytes() == before and not book.path.with_name("new.jsonl").exists()


def test_a_folder_that_cannot_be_written(book, monkeypatch):
    """Not by permissions: the tests may run as root, who has all of them."""
    true_open = os.open

    def read_only(path, flags, *mode):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return true_open(path, flags, *mode)

    monkeypatch.setattr("os.open", read_only)
    with pytest.raises(Failure, match="could not be written .Read-only file system"):
        book.book(request("a", event(1)))
    with pytest.raises(Failure, match="could not be written"):
        Ledger.create(book.path.with_name("new.jsonl"), terms())
    assert Ledger.open(book.path).entries == ()


def test_a_disk_without_locks_is_refused(book, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(Failure, match="could not be locked"):
        book.book(request("a", event(1)))


# The first line.


def test_delta_must_not_allow_publishing_one(tmp_path, book):
    with pytest.raises(UserError, match=r"delta 1e-15 is below 1e-10, where the accountant's rounding errors.*or more"):
        Ledger.create(tmp_path / "b.jsonl", terms(delta=1e-15, num_units=100))
    with pytest.raises(UserError, match="delta 0.01 is not below 1 / 100"):
        Ledger.create(tmp_path / "b.jsonl", terms(delta=0.01, num_units=100))
    assert not (tmp_path / "b.jsonl").exists()
    with pytest.raises(UserError, match="delta 1e-05 is not below 1 / 100000"):
        book.admit("cd", 100_000)
    assert Ledger.open(book.path).fingerprints == {"ab"}


def test_admitting_other_images_keeps_what_is_spent(book):
    book.book(request("a", event(1)))
    after = book.admit("cd", 2000)
    assert after.fingerprints == {"ab", "cd"} and after.spent() == epsilon([event(1)], DELTA)
    assert book.admit("cd", 2000).content == after.content
    assert len(after.book(request("b", event(1))).entries) == 2


def test_it_is_lines_of_json(book):
    book.book(request("a", event(2), release="r"))
    first, entry = map(json.loads, book.path.read_text().splitlines())
    assert first["version"] == 1 and first["owner"] == "north" and first["epsilon"] == 1e4
    assert entry["events"] == [[300.0, 1.0, 2]] and entry["training"] == "a" and entry["time"].endswith("+00:00")
