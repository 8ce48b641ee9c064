"""A study that runs in seconds, how to run it, and what two stores of it must have in common."""

import io
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

from rich.console import Console

from trilemma.data.roots import DataRoots
from trilemma.study.engine import Engine
from trilemma.study.load import load_study
from trilemma.study.plan import Plan, make_plan
from trilemma.study.progress import Progress
from trilemma.study.store import Store
from trilemma.study.workplace import Books, Workplace

#: Attacks at a radius that leaves few images: a diagnosis of those that stand is what takes longest.
TINY = """
name = "tiny"
question = "Does the line hold?"
seeds = [0]

[base]
data = { kind = "phantom", size = 16, train = 60, val = 12, test = 24, sites = 2, classes = 2 }
partition = { kind = "by_site", num_clients = 2 }
model = { kind = "resnet9", width = 4 }
local = { batch_size = 16 }
rounds = 2

[grid]
defence = [{ kind = "none" }, { kind = "fgsm", radius = "4/255" }]

[[compressions]]
kind = "none"
[[compressions]]
kind = "int8"
num_calibration = 16

[[evaluations]]
kind = "clean"
[[evaluations]]
kind = "pgd"
radii = ["32/255"]
steps = 2
[[evaluations]]
kind = "transfer"
radii = ["32/255"]
steps = 2
[[evaluations]]
kind = "all_at_once"
attacks = [
    { kind = "pgd", radii = ["32/255"], steps = 2 },
    { kind = "transfer", radii = ["32/255"], steps = 2 },
]
[[evaluations]]
kind = "cost"
repeats = 5
"""

#: One training, one model, one number: for tests that need a store and little in it.
SMALLEST = """
name = "smallest"
question = "Does anything run?"
base.data = { kind = "phantom", size = 16, train = 24, val = 8, test = 12, sites = 2, classes = 2 }
base.partition = { kind = "by_site", num_clients = 2 }
base.model = { kind = "resnet9", width = 4 }
base.local = { batch_size = 8 }
base.rounds = 1
"""

#: Two private hospitals, three rounds of one step: for tests that need something to account for.
PRIVATE = """
name = "private"
question = "Does the budget hold?"
base.data = { kind = "phantom", size = 16, train = 60, val = 8, test = 12, sites = 2, classes = 2 }
base.partition = { kind = "by_site", num_clients = 2 }
base.model = { kind = "resnet9", width = 4 }
base.local = { batch_size = 8, steps = 1 }
base.rounds = 3
base.privacy = { kind = "dp_sgd", noise_multiplier = 2.0, delta = 1e-3 }
"""

#: Columns that tell when and how fast and not what.
TIMINGS = {"opened_at", "seconds", "provenance", "peak_memory_bytes"}


def write_study(folder: Path, text: str = TINY, name: str = "study.toml") -> Path:
    """Returns a new study file."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def plan_of(study: Path, *overrides: str) -> Plan:
    return make_plan(load_study(study, overrides), study.name)


def roots_below(folder: Path, data: Path | None = None) -> DataRoots:
    """Returns roots whose cache is shared by all tests of a session's process."""
    return DataRoots(data=data or folder / "data", cache=folder / "cache", offline=True)


def run_plan(plan: Plan, folder: Path, roots: DataRoots, jobs: int = 1, books: Books | None = None) -> str:
    """Does what is missing of a study, as `trilemma run` does, and returns what the user saw."""
    shown = io.StringIO()
    place = Workplace(folder.resolve(), roots, "cpu", 1, os.getpid(), books)
    with Store(folder, write=True) as store:
        store.open_study(plan.study.name, plan.study.question, "")
        Engine(plan, store, place, jobs, Progress(Console(file=shown, width=500))).run()
    return shown.getvalue()


def rows_of(folder: Path, recover: bool = False) -> dict[str, list[Any]]:
    """Returns every row of every table of a store, without the timings.

    Args:
        folder: The store's folder.
        recover: Undo what a killed writer left half done, which a reader may not.
    """
    db = sqlite3.connect(f"file:{folder / 'store.db'}?mode={'rw' if recover else 'ro'}", uri=True)
    db.row_factory = sqlite3.Row
    try:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        return {
            table: [_lasting(row) for row in db.execute(f"SELECT * FROM {table} ORDER BY 1, 2")] for table in tables
        }
    finally:
        db.close()


def _lasting(row: sqlite3.Row) -> dict[str, Any]:
    kept = {name: row[name] for name in row.keys() if name not in TIMINGS}  # noqa: SIM118 - a Row iterates its values
    if "history" in kept:
        kept["history"] = [{k: v for k, v in one.items() if k != "seconds"} for one in json.loads(kept["history"])]
    if kept.get("unit") == "seconds":
        kept |= dict.fromkeys(("value", "low", "high"))
    return kept
