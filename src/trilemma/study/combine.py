"""Evaluations that follow from stored outcomes: the worst transfer from other trainings, and all attacks at once."""

import time
from collections.abc import Iterator
from functools import partial

import numpy as np

from trilemma.attacks.evasion.attack import Attack
from trilemma.attacks.evasion.specs import EvasionSpec
from trilemma.evaluation.measurement import Outcome, on_split
from trilemma.evaluation.robustness import robust_measurements, worst_logits
from trilemma.evaluation.specs import AllAtOnce, Clean, Diagnostics, EvaluationSpec, Transfer
from trilemma.study.keys import evaluation_key
from trilemma.study.plan import Cell, Plan
from trilemma.study.provenance import provenance
from trilemma.study.rows import EvaluationRow
from trilemma.study.store import Store
from trilemma.study.workplace import Workplace


def combine(plan: Plan, store: Store, place: Workplace) -> Iterator[list[EvaluationRow]]:
    """Yields the combined evaluations that are missing and whose parts are all there and stored."""
    transfers = [spec for spec in plan.evaluations if isinstance(spec, Transfer)]
    together = [spec for spec in plan.evaluations if isinstance(spec, AllAtOnce)]
    done = store.keys("evaluations")
    for cell in plan.cells:
        for spec in [*transfers, *together]:
            key = combined_key(plan, cell, spec)
            parts = part_keys(plan, cell, spec)
            if key not in done and not why_undefined(plan, cell, spec) and all(part in done for part in parts):
                yield [_combined(store, place, cell, spec, key, parts)]
                done.add(key)


def why_undefined(plan: Plan, cell: Cell, spec: EvaluationSpec) -> str:
    """Returns why a study cannot measure an evaluation of an artefact, or "" where it can."""
    parts = spec.attacks if isinstance(spec, AllAtOnce) else (spec,)
    if any(isinstance(part, Transfer) for part in parts) and not plan.strangers(cell):
        return "the study has no other training of this data and seed from which an attack could be transferred"
    return ""


def undefined_evaluations(plan: Plan) -> list[str]:
    """Returns what a study asks for and cannot measure, one phrase for each configuration and evaluation."""
    return list(
        dict.fromkeys(
            f"{spec.label} of {cell.training.configuration}: {reason}"
            for cell in plan.cells
            for spec in plan.evaluations
            if (reason := why_undefined(plan, cell, spec))
        )
    )


def combined_key(plan: Plan, cell: Cell, spec: Transfer | AllAtOnce) -> str:
    """Returns the key of a combined evaluation; with other sources it is another one."""
    specs = spec.attacks if isinstance(spec, AllAtOnce) else (spec,)
    transferred = any(isinstance(part, Transfer) for part in specs)
    sources = [source.key for source in plan.strangers(cell)] if transferred else []
    # "worst" keeps the only pair of a two-artefact study apart from its combination.
    return evaluation_key(cell.key, spec, [*sources, "worst"])


def part_keys(plan: Plan, cell: Cell, spec: EvasionSpec | Transfer | AllAtOnce) -> list[str]:
    """Returns the keys of the evaluations that an evaluation is made of; transfers count from other trainings only."""
    if isinstance(spec, AllAtOnce):
        return [key for part in spec.attacks for key in part_keys(plan, cell, part)]
    if isinstance(spec, Transfer):
        return [evaluation_key(cell.key, spec, (source.key,)) for source in plan.strangers(cell)]
    return [evaluation_key(cell.key, spec)]


def evidence_keys(plan: Plan, cell: Cell, spec: Diagnostics) -> tuple[list[str], list[str]]:
    """Returns the keys of what the study tried on an artefact within a budget, with its gradients and without them."""
    within = [s for s in plan.evaluations if isinstance(s, (Attack, Transfer)) and spec.budget in s.budgets]
    direct = [attack for attack in within if isinstance(attack, Attack)]
    white = [evaluation_key(cell.key, attack) for attack in direct if attack.sees_gradients]
    black = [evaluation_key(cell.key, attack) for attack in direct if not attack.sees_gradients]
    transfers = [key for attack in within if isinstance(attack, Transfer) for key in part_keys(plan, cell, attack)]
    return white, black + transfers


def diagnostics_key(plan: Plan, cell: Cell, spec: Diagnostics) -> str:
    """Returns the key of the diagnostics of an artefact; with other evidence it is another one."""
    white, elsewhere = evidence_keys(plan, cell, spec)
    return evaluation_key(cell.key, spec, white + elsewhere)


def key_of(plan: Plan, cell: Cell, spec: EvaluationSpec) -> str:
    """Returns the key of an evaluation of an artefact, whatever its kind; of a transfer, that of the worst source."""
    if isinstance(spec, (Transfer, AllAtOnce)):
        return combined_key(plan, cell, spec)
    return diagnostics_key(plan, cell, spec) if isinstance(spec, Diagnostics) else evaluation_key(cell.key, spec)


def pair_keys(plan: Plan, cell: Cell, spec: Transfer) -> list[str]:
    """Returns the keys of a transfer from every other artefact, the same training's other compressions included."""
    return [evaluation_key(cell.key, spec, (source.key,)) for source in plan.sources(cell)]


def _combined(
    store: Store, place: Workplace, cell: Cell, spec: Transfer | AllAtOnce, key: str, parts: list[str]
) -> EvaluationRow:
    started, training = time.perf_counter(), cell.training.spec
    test = place.dataset(training.data).test
    clean_NK = store.outcomes(evaluation_key(cell.key, Clean()))[0].logits_NK
    found = [outcome for part in parts for outcome in store.outcomes(part)]
    outcomes, measurements = [], []
    judge = partial(robust_measurements, labels_N=test.labels_N, units_N=test.units(), source=None, seed=training.seed)
    for radius in spec.radii:
        logits = [outcome.logits_NK for outcome in found if outcome.radius == radius]
        worst_NK = np.asarray(worst_logits(logits, clean_NK, test.labels_N))
        outcomes.append(Outcome(worst_NK, radius))
        measurements += judge(worst_NK, clean_NK, radius=radius)
    return EvaluationRow(
        key=key,
        artefact_key=cell.key,
        spec={**spec.model_dump(mode="json"), "label": spec.label},
        provenance=provenance(place.torch_device),
        seconds=time.perf_counter() - started,
        measurements=on_split(measurements, training.data.evaluate_on),
        outcomes=tuple(outcomes),
    )
