"""A private run may be killed at any moment: its books never show less than was released, nor its guarantee less."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest

from helpers.killed_run import Forks, released_rounds
from helpers.tiny_study import PRIVATE, rows_of, write_study
from trilemma.privacy.accounting import epsilon
from trilemma.privacy.ledger import Ledger

DELTA = 1e-3


class Hospitals:
    """A private study of two hospitals and the books that they start with."""

    def __init__(self, folder: Path, noise: str):
        self.folder, self.forks = folder, Forks()
        self.study = write_study(folder, PRIVATE.replace("delta = 1e-3", f'delta = {DELTA}, noise = "{noise}"'))
        create = ("ledger", "create", folder / "new", "--study", self.study, "--epsilon", 900.0, "--delta", DELTA)
        assert self.forks.run(create, folder / "none", math.inf).code == 0

    def start(self, trial: Path, delay: float = math.inf):
        if not trial.exists():
            shutil.copytree(self.folder / "new", trial / "books")
        where = ("--store", trial / "store", "--ledgers", trial / "books", "--jobs", 1, "--quiet")
        return self.forks.run(("run", self.study, *where), trial / "rounds", delay)

    def books(self, trial: Path) -> list[Ledger]:
        return [Ledger.open(path) for path in sorted((trial / "books").glob("*.jsonl"))]

    def claimed(self, trial: Path) -> list[float]:
        return list(json.loads(rows_of(trial / "store")["runs"][0]["guarantee"])["epsilon_by_client"].values())


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("noise", ["seeded", "system"])
def test_killed_at_random_the_books_never_show_less_than_was_released(kills, noise, roots, tmp_path, monkeypatch):
    monkeypatch.setenv("TRILEMMA_CACHE", str(roots.cache))
    hospitals = Hospitals(tmp_path, noise)
    undisturbed = hospitals.start(tmp_path / "undisturbed")
    assert undisturbed.code == 0 and released_rounds(tmp_path / "undisturbed" / "rounds") == [0, 1, 2]
    claimed = hospitals.claimed(tmp_path / "undisturbed")
    assert [book.spent() for book in hospitals.books(tmp_path / "undisturbed")] == claimed
    (step,) = {event for book in hospitals.books(tmp_path / "undisturbed") for event in book.events}

    rng, killed, seen, trial = random.Random(kills), 0, set(), tmp_path / "trial 0"
    while killed < kills or not _while_there_was_something(seen):
        assert killed < 10 * kills, "it was never killed while there was something"
        ending = hospitals.start(trial, rng.uniform(0.02, undisturbed.seconds))
        rounds = released_rounds(trial / "rounds")
        released = len(set(rounds) if noise == "seeded" else rounds)  # the same noise again tells nothing new
        for book in hospitals.books(trial):
            assert book.spent() >= epsilon([step.model_copy(update={"steps": released})], DELTA)
        seen.add((ending.killed, len(set(rounds))))
        killed += ending.killed
        if not ending.killed:
            assert ending.code == 0 and hospitals.claimed(trial) == claimed
            if noise == "seeded":
                assert [book.spent() for book in hospitals.books(trial)] == claimed
            trial = tmp_path / f"trial {killed}"
    print(f"{killed} kills; (killed, rounds begun until then): {sorted(seen)}")


def _while_there_was_something(seen: set[tuple[bool, int]]) -> bool:
    """Returns whether one of the kills came after a round had begun."""
    return any(begun > 0 for was_killed, begun in seen if was_killed)
