"""What a store holds, for the terminal."""

import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trilemma.errors import UserError
from trilemma.study.rows import ArtefactRow, RunRow
from trilemma.study.store import Store


def list_store(store: Store, console: Console) -> None:
    """Prints the studies and trainings of a store."""
    studies = Table(title="Studies")
    for name in ("name", "question", "last run"):
        studies.add_column(name)
    for row in store.studies():
        studies.add_row(*map(Text, row))
    runs = Table(title="Trainings")
    for name in ("key", "data", "algorithm", "privacy", "defence", "threat", "seed", "minutes"):
        # A key that is cut short can neither be copied nor searched for.
        runs.add_column(name, justify="right" if name in ("seed", "minutes") else "left", no_wrap=name == "key")
    for key in sorted(store.keys("runs")):
        run = store.run(key)
        assert run is not None  # the key was just read
        kinds = [run.spec[field]["kind"] for field in ("data", "algorithm", "privacy", "defence", "threat")]
        runs.add_row(key, *kinds, str(run.spec["seed"]), f"{run.seconds / 60:.1f}")
    console.print(studies)
    console.print(runs)


def show_key(store: Store, wanted: str, console: Console) -> None:
    """Prints a training or an artefact.

    Raises:
        UserError: If the key names nothing, or more than one.
    """
    table, key = find_key(store, wanted)
    if table == "runs" and (run := store.run(key)):
        _show_run(store, run, console)
    elif artefact := store.artefact(key):
        _show_artefact(store, artefact, console)


def find_key(store: Store, wanted: str) -> tuple[str, str]:
    """Returns the table, "runs" or "artefacts", and the key that a key or its beginning names.

    Raises:
        UserError: If it names nothing, or more than one.
    """
    found = [(table, key) for table in ("runs", "artefacts") for key in store.keys(table) if _matches(key, wanted)]
    if not found:
        raise UserError(f"key '{wanted}'", "names nothing in this store", "See the keys with: trilemma list")
    if len(found) > 1:
        keys = ", ".join(sorted(key for _, key in found)[:5])
        raise UserError(f"key '{wanted}'", f"is the beginning of several: {keys}", "Give more of it")
    return found[0]


def find_artefact(store: Store, wanted: str) -> ArtefactRow:
    """Returns the artefact that its key names, or that of the training which has no other.

    Raises:
        UserError: If the key names nothing, more than one, or a training of which there is not one artefact.
    """
    table, key = find_key(store, wanted)
    artefacts = [store.artefact(key)] if table == "artefacts" else store.artefacts_of(key)
    there = [artefact for artefact in artefacts if artefact is not None]
    if not there:
        problem = f"is the training {key}, of which there is no artefact yet"
        raise UserError(f"key '{wanted}'", problem, "Run its study to the end")
    if len(there) > 1:
        listed = "; ".join(f"{artefact.key} ({artefact.compression['label']})" for artefact in there)
        problem = f"is a training with {len(there)} artefacts: {listed}"
        raise UserError(f"key '{wanted}'", problem, "Give the key of one of them")
    return there[0]


def _matches(key: str, wanted: str) -> bool:
    return bool(wanted) and (key.startswith(wanted) or key.partition(":")[2].startswith(wanted))


def _show_run(store: Store, run: RunRow, console: Console) -> None:
    console.print(Text(f"training {run.key}", style="bold"))
    console.print_json(json.dumps(run.spec))
    table = Table(title="History")
    columns = ("round", "loss", "val_accuracy", "bytes_up", "bytes_down", "seconds")
    for name in columns:
        table.add_column(name, justify="right")
    for row in run.history:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    console.print(table)
    teacher = run.history[0].get("teacher") if run.history else None
    if teacher is not None:
        told = ", ".join(f"{name} {_cell(value)}" for name, value in teacher.items())
        console.print(f"its teacher, trained before: {told}", highlight=False, markup=False)
    console.print(run.guarantee.in_words(), highlight=False, markup=False)
    for artefact in store.artefacts_of(run.key):
        label = artefact.compression["label"]
        console.print(f"artefact {artefact.key}: {label}, {artefact.file_bytes} bytes", highlight=False, soft_wrap=True)
    peak = run.peak_memory_bytes / 2**20
    console.print(f"{run.num_parameters} parameters, {run.seconds:.1f} s, at most {peak:.0f} MiB", highlight=False)
    console.print_json(json.dumps(run.provenance))


def _show_artefact(store: Store, artefact: ArtefactRow, console: Console) -> None:
    console.print(Text.assemble((f"artefact {artefact.key}", "bold"), f" of training {artefact.run_key}"))
    console.print_json(json.dumps(artefact.compression))
    size = f"{artefact.file_bytes} bytes, {artefact.sparsity:.1%} of the weights are zero"
    console.print(f"{size}\nfile: {store.files.model(artefact.key)}", highlight=False, soft_wrap=True)
    console.print(artefact.guarantee.in_words(), highlight=False, markup=False)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
