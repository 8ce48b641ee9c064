"""Walks the cells of a study and does what the store does not hold yet.

Trainings, then artefacts, then clean metrics, then attacks and backdoors, all in parallel; then what combines stored
outcomes, then the diagnostics; and last, alone on the machine, latency. Whenever it is killed, what ended is in the
store and the rest is done next time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from trilemma.attacks.evasion.attack import Attack
from trilemma.attacks.evasion.specs import EvasionSpec
from trilemma.errors import TrilemmaError
from trilemma.evaluation.diagnostics import Tried
from trilemma.evaluation.specs import Backdoor, Clean, Cost, Diagnostics, Transfer
from trilemma.study.combine import combine, diagnostics_key, evidence_keys, undefined_evaluations
from trilemma.study.compress_job import compress_job
from trilemma.study.diagnose_job import diagnose_job
from trilemma.study.evaluate_job import AttackTask, attack_job, backdoor_job, clean_job, cost_job
from trilemma.study.facts import preflight
from trilemma.study.keys import evaluation_key
from trilemma.study.ledgers import book_stored, check_books
from trilemma.study.plan import Cell, Plan
from trilemma.study.progress import READING, REHEARSING, Progress
from trilemma.study.rehearsal import rehearse
from trilemma.study.store import Refused, Store
from trilemma.study.train_job import train_job
from trilemma.study.work import Failed, Job, run_jobs
from trilemma.study.workplace import Workplace


@dataclass(frozen=True)
class Engine:
    """What every stage needs.

    Attributes:
        plan: The study's cells.
        store: Open for writing.
        place: Where jobs run.
        num_processes: How many at once.
        progress: What the user sees.
    """

    plan: Plan
    store: Store
    place: Workplace
    num_processes: int
    progress: Progress

    def run(self) -> None:
        """Does everything that is missing.

        Raises:
            UserError: Before anything runs, if data, model, settings and compressions do not go together, or the
                hospitals' books do not allow it.
            Failure: At the end, if some jobs failed; everything else is stored.
        """
        with self.progress.waiting(READING):
            preflight(self.plan, self.store, self.place)
        with self.progress.waiting(REHEARSING):
            done = self.store.keys("artefacts")
            rehearse((cell for cell in self.plan.cells if cell.key not in done), self.place)
        for phrase in undefined_evaluations(self.plan):
            self.progress.note(f"cannot be measured: {phrase}")
        if self.place.books is not None:
            rows = self.store.runs(training.key for training in self.plan.trainings)
            for key, lineage in book_stored(check_books(self.plan, rows, self.place), rows):
                self.store.note_lineage(key, lineage)
        failed: list[TrilemmaError] = []
        failed += self._stage("training", missing_trainings(self.plan, self.store), self._store_run)
        failed += self._stage("compressing", self._compressions(), self.store.add_artefact)
        failed += self._stage("clean metrics", self._cleans(), lambda row: self.store.add_evaluations([row]))
        failed += self._stage("attacking", self._attacks(), self.store.add_evaluations)
        failed += self._stage("backdoors", self._backdoors(), lambda row: self.store.add_evaluations([row]))
        for rows in combine(self.plan, self.store, self.place):
            failed += self._kept("combine", self.store.add_evaluations, rows)
        failed += self._stage("diagnosing", self._diagnoses(), lambda row: self.store.add_evaluations([row]))
        alone = replace(self, num_processes=1)
        failed += alone._stage("latency", self._costs(), lambda row: self.store.add_evaluations([row]))
        if failed:
            others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise type(failed[0])(failed[0].where, failed[0].problem + others, failed[0].remedy)

    def _stage(self, name: str, jobs: list[Job], keep: Callable[[Any], None]) -> list[TrilemmaError]:
        failed = []
        with self.progress.stage(name, jobs, self.place.files):
            for job, result in run_jobs(jobs, self.place, self.num_processes):
                if isinstance(result, Failed):
                    failed.append(result.error)
                    self.progress.failed(result.error)
                else:
                    failed += self._kept(job.title, keep, result)
                self.progress.ended(job)
        return failed

    def _kept(self, title: str, keep: Callable[[Any], None], result: Any) -> list[TrilemmaError]:
        """Stores a result, and returns the error of one that the store does not take; the others go on.

        Raises:
            Failure: If the store takes none any more, on a full disk for example.
        """
        try:
            keep(result)
        except Refused as refused:
            error = Refused(f"{title}: {refused.where}", refused.problem, refused.remedy)
            self.progress.failed(error)
            return [error]
        return []

    def _store_run(self, row: Any) -> None:
        self.store.add_run(row)
        self.place.files.discard_checkpoint(row.key)

    def _compressions(self) -> list[Job]:
        done, jobs = self.store.keys("artefacts"), []
        for cell in self.plan.cells:
            run = self.store.run(cell.training.key)
            if cell.key not in done and run is not None:
                jobs.append(Job(_title("compress", cell), cell.key, compress_job, (cell, run.guarantee)))
        return jobs

    def _cleans(self) -> list[Job]:
        return [
            Job(_title("evaluate", cell), cell.key, clean_job, (cell,))
            for cell in self._ready()
            if evaluation_key(cell.key, Clean()) not in self.store.keys("evaluations")
        ]

    def _costs(self) -> list[Job]:
        costs = [spec for spec in self.plan.evaluations if isinstance(spec, Cost)]
        return [
            Job(_title("time", cell), cell.key, cost_job, (cell, spec))
            for spec in costs
            for cell in self._ready()
            if evaluation_key(cell.key, spec) not in self.store.keys("evaluations")
        ]

    def _clean_logits(self) -> dict[str, np.ndarray]:
        """Returns artefact key -> its logits on clean images, for those that were asked."""
        found = {cell.key: self.store.outcomes(evaluation_key(cell.key, Clean())) for cell in self._ready()}
        return {key: outcomes[0].logits_NK for key, outcomes in found.items() if outcomes}

    def _backdoors(self) -> list[Job]:
        wanted = [spec for spec in self.plan.evaluations if isinstance(spec, Backdoor)]
        if not wanted:
            return []
        done, clean = self.store.keys("evaluations"), self._clean_logits()
        return [
            Job(_title(f"look for {spec.label}", cell), cell.key, backdoor_job, (cell, spec, clean[cell.key]))
            for spec, cell in product(wanted, self._ready())
            if cell.key in clean and evaluation_key(cell.key, spec) not in done
        ]

    def _attacks(self) -> list[Job]:
        clean = self._clean_logits()
        attacks = attacks_to_make(self.plan, self.store.keys("evaluations"), set(clean))
        jobs = []
        for attack in attacks:
            logits = {cell.key: clean[cell.key] for cell in (attack.source, *attack.targets)}
            title = _title(f"attack with {attack.spec.label}", attack.source)
            jobs.append(Job(title, attack.source.key, attack_job, (replace(attack, clean=logits),)))
        return jobs

    def _diagnoses(self) -> list[Job]:
        done, jobs = self.store.keys("evaluations"), []
        wanted = [spec for spec in self.plan.evaluations if isinstance(spec, Diagnostics)]
        for spec, cell in product(wanted, self._ready()):
            key = diagnostics_key(self.plan, cell, spec)
            white, elsewhere = evidence_keys(self.plan, cell, spec)
            if key not in done and {*white, *elsewhere} <= done:
                tried = Tried(self._logits(white, spec.radius), self._logits(elsewhere, spec.radius))
                jobs.append(
                    Job(
                        _title(f"diagnose at {spec.budget.label}", cell),
                        cell.key,
                        diagnose_job,
                        (cell, spec, key, tried),
                    )
                )
        return jobs

    def _logits(self, keys: list[str], radius: float) -> dict[str, np.ndarray]:
        outcomes = [(key, outcome) for key in keys for outcome in self.store.outcomes(key)]
        return {key: outcome.logits_NK for key, outcome in outcomes if outcome.radius == radius}

    def _ready(self) -> list[Cell]:
        done = self.store.keys("artefacts")
        return [cell for cell in self.plan.cells if cell.key in done]


def _title(verb: str, cell: Cell) -> str:
    return f"{verb}: {cell.training.title}, {cell.compression.label}"


def missing_trainings(plan: Plan, store: Store) -> list[Job]:
    """Returns the trainings that the store does not hold."""
    done = store.keys("runs")
    return [
        Job(f"train: {training.title}", training.key, train_job, (training,))
        for training in plan.trainings
        if training.key not in done
    ]


def attacks_to_make(plan: Plan, done: set[str], ready: set[str]) -> list[AttackTask]:
    """Returns the attacks that are missing, each with all the artefacts that it has yet to be tried on.

    A transferred attack makes the same images on its source as the white-box attack of that spec, so the two are one
    job where the study asks for both.

    Args:
        plan: The study's cells.
        done: Keys of the evaluations in the store.
        ready: Keys of the artefacts that can be attacked.
    """
    direct = [spec for spec in plan.evaluations if isinstance(spec, Attack)]
    transfers: dict[EvasionSpec, Transfer] = {
        spec.attack: spec for spec in plan.evaluations if isinstance(spec, Transfer)
    }
    attacks = []
    for source in plan.cells:
        if source.key not in ready:
            continue
        for spec in dict.fromkeys([*direct, *transfers]):
            transfer = transfers.get(spec)
            white_box = spec in direct and evaluation_key(source.key, spec) not in done
            targets = tuple(
                cell
                for cell in (plan.sources(source) if transfer else ())  # "other artefacts" is symmetric
                if cell.key in ready and evaluation_key(cell.key, transfer, (source.key,)) not in done  # type: ignore[arg-type]
            )
            if white_box or targets:
                attacks.append(AttackTask(spec, source, white_box, transfer, targets, {}))
    return attacks
