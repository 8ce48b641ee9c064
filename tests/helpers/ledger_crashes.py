"""Processes that book and release and are killed: run as a script, so that they are forked from one with one thread.

python ledger_crashes.py random FOLDER SEED      # 100 kills at random moments
python ledger_crashes.py steps FOLDER            # a kill at each call that touches the disk
python ledger_crashes.py race FOLDER [unlocked]  # prints how many of two racing processes were let through, each round
"""

import fcntl
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import trilemma.privacy.ledger as ledger_module
from trilemma.errors import UserError
from trilemma.privacy.affordable import least_noise, most_steps, total
from trilemma.privacy.guarantee import DpEvent
from trilemma.privacy.ledger import Ledger, Request, book_all
from trilemma.privacy.ledger_file import Terms

DELTA = 1e-5


def terms(**changes: object) -> Terms:
    return Terms(
        **{
            "owner": "north",
            "unit": "example",
            "epsilon": 1e4,
            "delta": DELTA,
            "fingerprint": "ab",
            "num_units": 1000,
            "created": "2026-01-01T00:00:00+00:00",
            **changes,
        }
    )


def event(steps: int, noise: float = 300.0, rate: float = 1.0) -> DpEvent:
    return DpEvent(noise_multiplier=noise, sampling_rate=rate, steps=steps)


def request(training: str, *events: DpEvent, release: str | None = None) -> Request:
    return Request(training, "study", events, release, "local", 0, "seeded")


def fork(work: Callable[[], None]) -> int:
    """Starts `work` in a copy of this process, which ends with 2 where it is refused."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except UserError:
        code = 2
    finally:
        os._exit(code)
    return 0


def release(path: Path, training: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{training}\n".encode())
    os.fsync(file)
    os.close(file)


def book_and_release(books: list[Path], released: Path, first: int) -> None:
    """Goes on for ever, with one step for each training."""
    for number in itertools.count(first):
        book_all({path: request(str(number), event(1)) for path in books})
        release(released, str(number))


def check(books: list[Path], released: Path, before: list[list[str]]) -> list[list[str]]:
    """Nothing released is missing in any book, nothing booked has got lost, and the total is no smaller."""
    names = released.read_text().split() if released.exists() else []
    cost, booked = total([event(len(names))], delta=DELTA), []
    for path, known in zip(books, before, strict=True):
        book = Ledger.open(path)
        trainings = [entry.training for entry in book.entries]
        assert trainings[: len(known)] == known, path
        assert set(names) <= set(trainings), (path, names, trainings)
        assert book.spent() >= cost
        booked.append(trainings)
    return booked


def kill_at_random(folder: Path, seed: int) -> None:
    books, released = [folder / "north.jsonl", folder / "south.jsonl"], folder / "released"
    moments = random.Random(seed)
    for path in books:
        Ledger.create(path, terms())
    for steps in range(1, 150):  # known to the children beforehand, so that kills hit the disk's work and not sums
        total([event(steps)], delta=DELTA)
    released.touch()
    booked: list[list[str]] = [[], []]
    midst = 0
    for _ in range(100):
        first = max((int(name) for names in booked for name in names), default=0) + 1
        ready, started = os.pipe()

        def work(first: int = first, started: int = started) -> None:
            os.write(started, b".")
            book_and_release(books, released, first)

        child = fork(work)
        os.read(ready, 1)
        os.close(ready)
        os.close(started)
        time.sleep(moments.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        booked = check(books, released, booked)
        last = {names[-1] for names in booked if names}
        midst += not last <= set(released.read_text().split()) or len(last) > 1
    print(len(released.read_text().split()), midst)


def kill_at_every_step(folder: Path) -> None:
    """Each call is cut before it, after it, and a write also in its midst."""
    survived, number = False, 0
    for number in itertools.count():
        place = folder / str(number)
        place.mkdir()
        books, released = [place / "north.jsonl", place / "south.jsonl"], place / "released"
        for path in books:
            Ledger.create(path, terms())
            Ledger.open(path).book(request("1", event(1)))
        child = fork(lambda b=books, r=released, n=number: _killed_at(n, b, r))
        _, status = os.waitpid(child, 0)
        booked = check(books, released, [["1"], ["1"]])
        survived = os.WIFEXITED(status)
        if survived:
            assert os.WEXITSTATUS(status) == 0 and released.read_text() == "2\n"
            break
        # Whoever comes next finds sound books and can go on.
        book_all({path: request("3", event(3)) for path in books})
        assert [Ledger.open(path).content.torn for path in books] == [0, 0]
        assert all(names[-1] in ("1", "2") for names in booked)
    print(number)


def _killed_at(number: int, books: list[Path], released: Path) -> None:
    calls = itertools.count()

    def reached() -> bool:
        return next(calls) == number

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def cut(call):
        def wrapped(*arguments):
            if reached():
                die()
            if call is os_write and reached():
                os_write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                die()
            result = call(*arguments)
            if reached():
                die()
            return result

        return wrapped

    os_write = os.write
    for name in ("open", "write", "fsync", "close", "ftruncate"):
        setattr(os, name, cut(getattr(os, name)))
    book_all({path: request("2", event(2)) for path in books})
    release(released, "2")


def race(folder: Path, locked: bool) -> None:
    """Two processes each ask for more than half of the budget, as nearly at once as can be."""
    big = request("big", event(30, noise=20.0))
    budget = 1.2 * total(big.events, delta=DELTA)
    least_noise(big.events, big.events, DELTA, budget)
    most_steps(big.events, big.events, DELTA, budget)
    if not locked:  # what the test must notice: no lock, and time between looking and writing
        fcntl.flock = lambda *_: None
        append = ledger_module.append
        ledger_module.append = lambda *arguments: (time.sleep(0.05), append(*arguments))
    winners = []
    for number in range(20 if locked else 2):
        path = folder / f"{number}.jsonl"
        empty = Ledger.create(path, terms(epsilon=budget))
        # What the processes will compute is known to both beforehand, so that they meet at the lock.
        assert empty.spent(*big.events) <= budget and big.events and total(big.events, big.events, delta=DELTA) > budget
        start = time.monotonic() + 0.01

        def work(path: Path = path, start: float = start) -> None:
            while time.monotonic() < start:
                pass
            Ledger.open(path).book(big)

        children = [fork(work) for _ in range(2)]
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert set(codes) <= {0, 2}
        winners.append(codes.count(0))
        assert not locked or Ledger.open(path).spent() <= budget
    print(*winners)


if __name__ == "__main__":
    mode, where = sys.argv[1], Path(sys.argv[2])
    if mode == "random":
        kill_at_random(where, int(sys.argv[3]))
    elif mode == "steps":
        kill_at_every_step(where)
    else:
        race(where, "unlocked" not in sys.argv)
