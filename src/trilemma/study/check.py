"""What a study would do, before it does anything."""

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trilemma.attacks.poisoning.on_records import Backdoor as PlantedBackdoor
from trilemma.data.records import Dataset, Partition
from trilemma.data.roots import DataRoots
from trilemma.data.summary import client_rows
from trilemma.evaluation.specs import Backdoor
from trilemma.federation.doubts import doubts_about_rule, doubts_about_threat
from trilemma.study.combine import key_of, undefined_evaluations, why_undefined
from trilemma.study.facts import facts_key, prepare_all, public_data
from trilemma.study.ledgers import check_books, unpromised_phrases
from trilemma.study.plan import Plan, Training, without_guarantee
from trilemma.study.progress import READING, REHEARSING, Progress
from trilemma.study.rehearsal import rehearse
from trilemma.study.rows import RunRow
from trilemma.study.store import Store
from trilemma.study.workplace import Books, Workplace


def check_study(
    plan: Plan,
    folder: Path,
    roots: DataRoots,
    console: Console,
    ledgers: Path | None = None,
    device: str = "cpu",
    threads: int = 1,
) -> None:
    """Prints the study's size, what of it is stored, its data, what cannot be measured and what has no guarantee.

    Args:
        plan: The study's cells.
        folder: The store's folder.
        roots: Where data are read and cached.
        console: The terminal.
        ledgers: Folder of the hospitals' budget books, if any are kept.
        device: On which it would run, "cpu" or "cuda", and
        threads: with how many torch threads: on others, a seeded training is another release.

    Raises:
        UserError: If anything in the study cannot be, or the hospitals' budget books do not allow it.
    """
    books = Books(ledgers, plan.study.name) if ledgers else None
    place = Workplace(folder, roots, device, threads, 0, books)
    with Progress(console).waiting(READING):
        prepare_all(plan, place)
    with Progress(console).waiting(REHEARSING):
        done = _stored(folder)[1]
        rehearse((cell for cell in plan.cells if cell.key not in done), place)
    show_data(plan, roots, console)
    console.print(_size_table(plan, folder))
    _print_phrases("\nCannot be measured:", undefined_evaluations(plan), console)
    if books is not None:
        check_books(plan, _runs(plan, folder), place)
        console.print("\nThe hospitals' budget books allow all of it.")
    title = "Charged, and yet not promised" if books else "Nothing is promised for"
    _print_phrases(f"\n{title}:", unpromised_phrases(plan, place), console)
    _print_phrases("\nRules of aggregation that may withstand less than they say:", _rule_doubts(plan), console)
    _print_phrases("\nThreats that may do nothing, or whose doing is not measured:", _threat_doubts(plan), console)
    _print_phrases("\nNo guarantee can be given for:", list(dict.fromkeys(without_guarantee(plan))), console)


def _rule_doubts(plan: Plan) -> list[str]:
    each = [
        (training.configuration, doubt) for training in plan.trainings for doubt in doubts_about_rule(training.spec)
    ]
    return _each_doubt_once(each)


def _threat_doubts(plan: Plan) -> list[str]:
    looked_for = [spec for spec in plan.evaluations if isinstance(spec, Backdoor)]
    each = []
    for training in plan.trainings:
        threat = training.spec.threat
        each += [(training.configuration, doubt) for doubt in doubts_about_threat(training.spec)]
        if isinstance(threat, PlantedBackdoor) and not any(
            (spec.trigger, spec.target) == (threat.trigger, threat.target) for spec in looked_for
        ):
            each.append((training.configuration, "no evaluation of the kind 'backdoor' has its trigger and its target"))
    return _each_doubt_once(each)


def _each_doubt_once(each: list[tuple[str, str]]) -> list[str]:
    """Returns a line for each doubt: with the configuration that it is about, or with how many and the first."""
    about: dict[str, dict[str, None]] = {}
    for configuration, doubt in each:
        about.setdefault(doubt, {})[configuration] = None
    lines = []
    for doubt, configurations in about.items():
        first, *others = configurations
        count = f" and {len(others)} other configurations" if len(others) > 1 else f" and {others[0]}" if others else ""
        lines.append(f"{first}{count}: {doubt}")
    return lines


def _print_phrases(title: str, phrases: list[str], console: Console) -> None:
    if phrases:
        console.print(title)
        for phrase in phrases:
            console.print(f"  {phrase}", highlight=False, markup=False)


def show_data(plan: Plan, roots: DataRoots, console: Console) -> None:
    """Prints what each source of a study holds and how it is partitioned, and what it pretrains on."""
    place = Workplace(Path(), roots, "cpu", 1, 0)
    for training in _first_of(plan.trainings, facts_key):
        dataset = place.dataset(training.spec.data)
        partition = training.spec.partition.make()(dataset, training.spec.seed)
        _print_dataset(dataset, console)
        console.print(_client_table(training, dataset, partition))
    for public, purpose in public_data(plan).items():
        console.print(f"\n{purpose.capitalize()}, of its training images:")
        _print_dataset(public.load(roots), console)


def _first_of(trainings: Iterable[Training], name) -> list[Training]:  # noqa: ANN001 - Training -> str
    first: dict[str, Training] = {}
    for training in trainings:
        first.setdefault(name(training), training)
    return list(first.values())


def _print_dataset(dataset: Dataset, console: Console) -> None:
    synthetic = " (synthetic images)" if dataset.synthetic else ""
    shape = "grey" if dataset.channels == 1 else "colour"
    console.print(Text.assemble((dataset.name, "bold"), f"{synthetic}: {dataset.image_size} pixels, {shape}"))
    console.print(dataset.source, highlight=False, markup=False)
    counts = f"{len(dataset.train)} train, {len(dataset.val)} val, {len(dataset.test)} test"
    console.print(f"{counts}; classes: {', '.join(dataset.classes)}", highlight=False, markup=False)
    for warning in dataset.warnings:
        console.print(f"note: {warning}", highlight=False, markup=False)


def _client_table(training: Training, dataset: Dataset, partition: Partition) -> Table:
    table = Table(title=f"Training records by hospital: {training.spec.partition.label}, seed {training.spec.seed}")
    table.add_column("hospital")
    for name in ("records", "patients", *dataset.classes):
        table.add_column(Text(name), justify="right")
    for row in client_rows(dataset, partition):
        patients = "unknown" if row["patients"] is None else str(row["patients"])
        table.add_row(
            Text(row["client"]), str(row["records"]), patients, *(str(row["classes"][c]) for c in dataset.classes)
        )
    return table


def _size_table(plan: Plan, folder: Path) -> Table:
    runs, artefacts, evaluations = _stored(folder)
    wanted = [
        key_of(plan, cell, spec)
        for cell in plan.cells
        for spec in plan.evaluations
        if not why_undefined(plan, cell, spec)
    ]
    table = Table(title=f"Study '{plan.study.name}'")
    for name in ("", "asked for", "in the store", "to do"):
        table.add_column(name, justify="left" if not name else "right")
    rows = (
        ("trainings", [training.key for training in plan.trainings], runs),
        ("artefacts", [cell.key for cell in plan.cells], artefacts),
        ("evaluations", wanted, evaluations),
    )
    for name, keys, stored in rows:
        done = sum(key in stored for key in keys)
        table.add_row(name, str(len(keys)), str(done), str(len(keys) - done))
    return table


def _runs(plan: Plan, folder: Path) -> dict[str, RunRow]:
    if not (folder / "store.db").is_file():
        return {}
    with Store(folder) as store:
        return store.runs(training.key for training in plan.trainings)


def _stored(folder: Path) -> tuple[set[str], set[str], set[str]]:
    if not (folder / "store.db").is_file():
        return set(), set(), set()
    with Store(folder) as store:
        return store.keys("runs"), store.keys("artefacts"), store.keys("evaluations")
