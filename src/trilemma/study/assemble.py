"""From the store to what a report reads: the results of one study, and what is missing of it."""

from typing import Any

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.attack import Attack
from trilemma.evaluation.estimates import undefined
from trilemma.evaluation.measurement import Measurement, on_split
from trilemma.evaluation.specs import AllAtOnce, Diagnostics, EvaluationSpec, Transfer
from trilemma.federation.doubts import doubts_about_rule, doubts_about_threat
from trilemma.federation.early_stopping import best_round
from trilemma.results import Artefact, DataFacts, Evaluated, Example, Results, Run
from trilemma.study.combine import diagnostics_key, key_of, pair_keys, why_undefined
from trilemma.study.facts import facts_key, public_data, public_key
from trilemma.study.judgement import Found, doubts_of, judged
from trilemma.study.plan import Cell, Plan, Training
from trilemma.study.store import Store

#: Examples that a report shows at most; each is three images.
MAX_EXAMPLES = 24


def assemble(plan: Plan, store: Store, toml: str, command: str) -> Results:
    """Returns everything that the store holds of a study.

    Args:
        plan: The study's cells.
        store: Open.
        toml: The study file's text.
        command: What reproduces it.
    """
    missing: list[str] = []
    runs = [run for training in plan.trainings if (run := run_of(training, store, missing))]
    artefacts, evaluated, examples = [], [], []
    for cell in plan.cells:
        artefact = _artefact(cell, store)
        if artefact is None:
            if store.run(cell.training.key):
                missing.append(f"artefact {_place(cell)}")
            continue
        artefacts.append(artefact)
        for found, shown in _evaluated(plan, cell, store, missing):
            evaluated.append(found)
            examples.append(shown)
    return Results(
        name=plan.study.name,
        question=plan.study.question,
        study_toml=toml,
        seeds=plan.study.seeds,
        data=_known(store, [facts_key(training) for training in plan.trainings]),
        runs=tuple(runs),
        artefacts=tuple(artefacts),
        evaluated=tuple(evaluated),
        examples=tuple(example for shown in examples for example in shown)[:MAX_EXAMPLES],
        missing=tuple(missing),
        command=command,
        environment=runs[0].provenance if runs else {},
        public=_known(store, [public_key(data) for data in public_data(plan)]),
    )


def run_of(training: Training, store: Store, missing: list[str]) -> Run | None:
    """Returns what a report knows of a training, or None and a phrase more in `missing`."""
    row = store.run(training.key)
    if row is None:
        missing.append(f"training {training.configuration}, seed {training.spec.seed}")
        return None
    secret = row.guarantee.unit == "client"  # time and memory tell how many hospitals were drawn
    return Run(
        key=row.key,
        configuration=training.configuration,
        varied=training.varied,
        seed=training.spec.seed,
        spec=row.spec,
        history=[_without_looks(of_round) for of_round in row.history],
        guarantee=row.guarantee,
        provenance=row.provenance,
        seconds=None if secret else row.seconds,
        peak_memory_bytes=None if secret else row.peak_memory_bytes,
        num_parameters=row.num_parameters,
        chosen_round=best_round(training.spec, row.history),
        labels=_labels(training),
        doubts=(*doubts_about_rule(training.spec), *doubts_about_threat(training.spec)),
    )


def _labels(training: Training) -> dict[str, str]:
    """Returns what the training's rule and threat are called, and what else a study varies."""
    spec = training.spec
    return {**training.varied, "aggregation": spec.aggregation.label, "threat": spec.threat.label}


def _without_looks(of_round: dict[str, Any]) -> dict[str, Any]:
    """Returns a round of the history without its robust accuracies: they chose a round, and nobody diagnosed them."""
    return {name: value for name, value in of_round.items() if not name.startswith("robust_val_")}


def _place(cell: Cell) -> str:
    return f"{cell.training.configuration}, seed {cell.training.spec.seed}, {cell.compression.label}"


def _artefact(cell: Cell, store: Store) -> Artefact | None:
    row = store.artefact(cell.key)
    if row is None:
        return None
    return Artefact(row.key, row.run_key, cell.compression.label, row.file_bytes, row.sparsity, row.guarantee)


def _evaluated(plan: Plan, cell: Cell, store: Store, missing: list[str]) -> list[tuple[Evaluated, tuple[Example, ...]]]:
    """Returns every evaluation of an artefact; a transfer is one with a row for each source and one for the worst."""
    measured: list[tuple[Found, tuple[Example, ...]]] = []
    for spec in plan.evaluations:
        keys = _keys(plan, cell, spec)
        measurements: tuple[Measurement, ...] = ()
        if isinstance(spec, (Transfer, AllAtOnce)) and (reason := why_undefined(plan, cell, spec)):
            measurements = on_split(_undefined(spec, reason), cell.training.spec.data.evaluate_on)
        rows = [row for key in keys if (row := store.evaluation(key))]
        if len(rows) < len(keys):
            missing.append(f"{spec.label} of {_place(cell)}")
        if not rows and not measurements:
            continue
        measurements += tuple(measurement for row in rows for measurement in row.measurements)
        seconds = sum(row.seconds for row in rows)
        label = str(rows[0].spec["label"]) if rows and isinstance(spec, Attack) else spec.label
        found = Found(key_of(plan, cell, spec), spec, Evaluated(cell.key, label, spec.kind, measurements, seconds))
        measured.append((found, tuple(example for row in rows for example in row.examples)))
    shown = judged([found for found, _ in measured], _doubts(plan, cell, store))
    return list(zip(shown, (examples for _, examples in measured), strict=True))


def _keys(plan: Plan, cell: Cell, spec: EvaluationSpec) -> list[str]:
    """Returns the keys of the rows that an evaluation of an artefact consists of."""
    known = [] if why_undefined(plan, cell, spec) else [key_of(plan, cell, spec)]
    return known + (pair_keys(plan, cell, spec) if isinstance(spec, Transfer) else [])


def _doubts(plan: Plan, cell: Cell, store: Store) -> dict[Budget, str]:
    specs = [spec for spec in plan.evaluations if isinstance(spec, Diagnostics)]
    return doubts_of((spec.budget, store.evaluation(diagnostics_key(plan, cell, spec))) for spec in specs)


def _undefined(spec: Transfer | AllAtOnce, reason: str) -> tuple[Measurement, ...]:
    return tuple(undefined("robust_accuracy", reason)._replace(radius=radius) for radius in spec.radii)


def _known(store: Store, keys: list[str]) -> tuple[DataFacts, ...]:
    return tuple(known[0] for key in dict.fromkeys(keys) if (known := store.facts(key)))
