"""From the store to what a report reads: the results of one study, and what is missing of it."""

from dataclasses import replace
from functools import partial
from typing import Any

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.attack import Attack
from trilemma.evaluation.bounds import Known, known_from, marked, told
from trilemma.evaluation.estimates import undefined
from trilemma.evaluation.flags import withheld
from trilemma.evaluation.measurement import Measurement, on_split
from trilemma.evaluation.specs import AllAtOnce, Diagnostics, EvaluationSpec, Transfer
from trilemma.evaluation.strength import strength
from trilemma.federation.doubts import doubts_about_rule, doubts_about_threat
from trilemma.federation.early_stopping import best_round
from trilemma.results import Artefact, DataFacts, Evaluated, Example, Results, Run
from trilemma.study.combine import diagnostics_key, key_of, pair_keys, why_undefined
from trilemma.study.facts import facts_key, public_data, public_key
from trilemma.study.plan import Cell, Plan, Training
from trilemma.study.store import Store

#: Examples that a report shows at most; each is three images.
MAX_EXAMPLES = 24

_ATTACKS = (Attack, Transfer, AllAtOnce)

#: Why robust accuracies are withheld until it has been looked whether they are real.
NOT_DIAGNOSED = "withheld until the diagnostics have run"


def assemble(plan: Plan, store: Store, toml: str, command: str) -> Results:
    """Returns everything that the store holds of a study.

    Args:
        plan: The study's cells.
        store: Open.
        toml: The study file's text.
        command: What reproduces it.
    """
    missing: list[str] = []
    runs = [run for training in plan.trainings if (run := _run(training, store, missing))]
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


def _run(training: Training, store: Store, missing: list[str]) -> Run | None:
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
    doubts, measured = _doubts(plan, cell, store), []
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
        found = Evaluated(cell.key, label, spec.kind, measurements, seconds)
        measured.append((spec, found, tuple(example for row in rows for example in row.examples)))
    known = [what for spec, found, _ in measured for what in _known_of(plan, cell, spec, found)]
    judged = partial(_judged, plan, cell, known=known, doubts=doubts)
    return [(judged(spec, found), examples) for spec, found, examples in measured]


def _known_of(plan: Plan, cell: Cell, spec: EvaluationSpec, found: Evaluated) -> list[Known]:
    if not isinstance(spec, (Diagnostics, *_ATTACKS)):
        return []
    label = "" if isinstance(spec, Diagnostics) else found.evaluation
    return known_from(key_of(plan, cell, spec), label, spec.norm, found.measurements)


def _judged(
    plan: Plan, cell: Cell, spec: EvaluationSpec, found: Evaluated, *, known: list[Known], doubts: dict[Budget, str]
) -> Evaluated:
    """Returns an evaluation with what may be read of it: bounds are marked, doubtful values withheld."""
    if isinstance(spec, Diagnostics):
        within = {spec.radius: doubts[spec.budget]}
        shown = (_withheld(m, within) if m.metric == "robust_accuracy_bound" else m for m in told(found.measurements))
        return replace(found, measurements=tuple(shown))
    if not isinstance(spec, _ATTACKS):
        return found
    measurements = marked(key_of(plan, cell, spec), found.evaluation, spec.norm, found.measurements, known)
    within = {budget.radius: doubts[budget] for budget in spec.budgets}
    measurements = tuple(_withheld(measurement, within) for measurement in measurements)
    return replace(found, measurements=measurements, strength=strength(spec))


def _keys(plan: Plan, cell: Cell, spec: EvaluationSpec) -> list[str]:
    """Returns the keys of the rows that an evaluation of an artefact consists of."""
    known = [] if why_undefined(plan, cell, spec) else [key_of(plan, cell, spec)]
    return known + (pair_keys(plan, cell, spec) if isinstance(spec, Transfer) else [])


def _doubts(plan: Plan, cell: Cell, store: Store) -> dict[Budget, str]:
    """Returns why robustness within each budget is withheld: raised flags, or diagnostics that were not made; or ""."""
    doubts: dict[Budget, list[str]] = {}
    hidden: dict[str, list[str]] = {}
    for spec in plan.evaluations:
        if isinstance(spec, Diagnostics):
            row = store.evaluation(diagnostics_key(plan, cell, spec))
            doubts.setdefault(spec.budget, []).append(withheld(row.measurements) if row else NOT_DIAGNOSED)
            hidden.setdefault(spec.norm, []).append(withheld(row.measurements, elsewhere=True) if row else "")
    return {budget: _joined(own) or _elsewhere(hidden[budget.norm]) for budget, own in doubts.items()}


def _elsewhere(hidden: list[str]) -> str:
    """Returns why nothing is believed within a radius where no flag was raised: one was within another radius."""
    why = _joined(hidden)
    return f"within another radius of this norm {why}" if why else ""


def _joined(reasons: list[str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, reasons)))


def _withheld(measurement: Measurement, doubts: dict[float, str]) -> Measurement:
    """Returns a measurement under attack without its value where there is a doubt at its radius."""
    doubt = doubts.get(measurement.radius, "") if measurement.radius is not None else ""
    if measurement.value is None or not doubt:
        return measurement
    return measurement._replace(value=None, low=None, high=None, status="withheld", reason=doubt)


def _undefined(spec: Transfer | AllAtOnce, reason: str) -> tuple[Measurement, ...]:
    return tuple(undefined("robust_accuracy", reason)._replace(radius=radius) for radius in spec.radii)


def _known(store: Store, keys: list[str]) -> tuple[DataFacts, ...]:
    return tuple(known[0] for key in dict.fromkeys(keys) if (known := store.facts(key)))
