"""One row per configuration and compression: what the seeds measured, put together for tables and sentences."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trilemma.evaluation.measurement import Measurement
from trilemma.evaluation.strength import STRONG
from trilemma.report import numbers
from trilemma.report.attacked import Attacked, Scored, attacked, scored
from trilemma.report.cells import WORST, Cell, by_seed, hospitals, is_alone, measured, owner
from trilemma.report.claims import TIME_IS_SECRET, Claim, claim_of
from trilemma.report.estimates import Estimate, estimate, exact
from trilemma.report.flags import Flag, flags_of
from trilemma.report.sent import UNSENT, Traffic, traffic_of
from trilemma.results import Artefact, DataFacts, Evaluated, Results, Run

#: Fields of a training that a study may tune per configuration without changing what is compared.
_TUNING = frozenset({"local", "rounds", "server", "aggregation", "averaging", "pretraining", "early_stopping"})

#: Label of a model as it was trained.
UNCOMPRESSED = "fp32"


@dataclass(frozen=True)
class Row:
    """One configuration, compressed one way, over its seeds.

    Attributes:
        configuration: The training's label.
        compression: The artefact's label.
        spec: The training's spec without its seed and without the hospital that trained alone.
        seeds: Seeds that reached this row.
        num_trainings: Trainings behind it; more than the seeds where each hospital trained alone.
        clean: Metric -> estimate over all test records.
        clients: Client name, "worst" or "worst honest" -> metric -> estimate; a hospital that trained alone is judged
            on its own.
        attacked: Every attack and radius.
        epsilon: The largest over clients and seeds, or None where nothing may be claimed.
        claim: What epsilon is about, at the largest delta over seeds; None where nothing may be claimed.
        void: Why nothing may be claimed, one phrase each; empty where epsilon stands.
        file_bytes: Of the shipped file.
        multiply_adds: For one image.
        latency_1: Seconds for one image; the interval holds quartiles.
        latency_32: Seconds for 32 images.
        bytes_per_round: Sent up and down by all clients together.
        training_seconds: Per seed, over all hospitals that trained alone.
        constant: One phrase per seed whose model gives every image the same answer.
        labels: Axis -> label of this configuration's value, such as {"threat": "sign flip 4x by 2 clients"}.
        triggered: Backdoor that was looked for -> metric -> estimate.
        traffic: What its hospitals sent and received, one by one.
        diagnosed: Every sign of robustness that is not there, looked for in every training, raised or not.
    """

    configuration: str
    compression: str
    spec: dict[str, Any]
    seeds: tuple[int, ...]
    num_trainings: int
    clean: dict[str, Estimate]
    clients: dict[str, dict[str, Estimate]]
    attacked: tuple[Attacked, ...]
    epsilon: float | None
    claim: Claim | None
    void: tuple[str, ...]
    file_bytes: Estimate
    latency_1: Estimate
    latency_32: Estimate
    bytes_per_round: Estimate
    training_seconds: Estimate
    constant: tuple[str, ...]
    labels: dict[str, str] = field(default_factory=dict)
    triggered: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    multiply_adds: Estimate = Estimate()
    traffic: Traffic = Traffic()
    diagnosed: tuple[Flag, ...] = ()

    @property
    def title(self) -> str:
        """Returns configuration and compression in one label."""
        return f"{self.configuration}, {self.compression}"

    @property
    def majority(self) -> float | None:
        """Returns the accuracy of always giving the most frequent answer, or None where it was not measured."""
        return self.metric("majority_accuracy").value

    @property
    def promise(self) -> str:
        """Returns "ε ≤ 7.96 for any one image, δ 1e-05, local noise (seeded)", or "" where nothing may be claimed."""
        if self.epsilon is None or self.claim is None:
            return ""
        return f"ε ≤ {numbers.epsilon(self.epsilon)} for {self.claim.in_words}"

    @property
    def raised(self) -> tuple[Flag, ...]:
        """Returns the flags that were raised in any training."""
        return tuple(flag for flag in self.diagnosed if flag.raised)

    @property
    def flags(self) -> tuple[str, ...]:
        """Returns a phrase for every raised flag: its name in words, its seed and its evidence."""
        return tuple(flag.phrase for flag in self.raised)

    def metric(self, name: str) -> Estimate:
        """Returns a clean metric over all test records."""
        return self.clean.get(name, Estimate())

    def client(self, name: str, metric: str) -> Estimate:
        """Returns a clean metric over the test records of one client, or of the "worst" or "worst honest"."""
        return self.clients.get(name, {}).get(metric, Estimate())

    @property
    def worst(self) -> Estimate:
        """Returns the accuracy of the worst hospital; where some are malicious, of the worst that is not."""
        return self.client("worst honest" if "worst honest" in self.clients else "worst", "accuracy")

    def backdoor(self, name: str, metric: str) -> Estimate:
        """Returns what a backdoor's trigger does, such as "attack_success_rate"."""
        return self.triggered.get(name, {}).get(metric, Estimate())

    def under(self, evaluation: str, radius: float) -> Attacked:
        """Returns the row under one attack, with the reason "not measured" where it was not attacked so."""
        for at in self.attacked:
            if at.evaluation == evaluation and at.radius == radius:
                return at
        return Attacked(evaluation, 0, radius)

    def scored(self, evaluation: str, radius: float) -> Scored:
        """Returns the robust AUROC at a radius and which attack measured it, another of its norm where it does not."""
        return scored(self.attacked, evaluation, radius)

    def kind(self, field: str) -> str:
        """Returns the `kind` that a field of the training has, such as "dp_sgd" for privacy; "none" without one."""
        value = self.spec.get(field)
        return str(value.get("kind", "none")) if isinstance(value, dict) else "none"

    @property
    def conditions(self) -> str:
        """Returns what a configuration meets and does not choose: data, partition and threat."""
        return json.dumps(
            [self.spec.get(field) for field in ("data", "partition", "threat")], sort_keys=True, default=str
        )

    def profile(self, *without: str, tuned: bool = False) -> str:
        """Returns what must be equal for two rows to differ in nothing but the fields `without`.

        Args:
            *without: Fields of the training to leave out.
            tuned: Leave out how each side was tuned as well (learning rate, rounds ...).
        """
        left_out = {*without, *(_TUNING if tuned else ())}
        return json.dumps({k: v for k, v in self.spec.items() if k not in left_out}, sort_keys=True, default=str)


class Headline(NamedTuple):
    """The two numbers by which rows are compared at a glance.

    Attributes:
        utility: "auroc" where every row has one, otherwise "accuracy".
        evaluation: The strongest attack of the study, or "" where nothing was attacked.
        radius: The largest radius that all attacked rows share.
    """

    utility: str
    evaluation: str
    radius: float


def configuration_rows(results: Results) -> tuple[Row, ...]:
    """Returns a row for every configuration and compression that has an artefact, in the study's order."""
    runs = {run.key: run for run in results.runs}
    found: dict[str, list[Evaluated]] = {}
    for evaluated in results.evaluated:
        found.setdefault(evaluated.artefact_key, []).append(evaluated)
    groups: dict[tuple[str, str], list[Cell]] = {
        (run.configuration, artefact.compression): [] for run in results.runs for artefact in _of_run(results, run)
    }
    for artefact in results.artefacts:
        if artefact.run_key in runs:
            run = runs[artefact.run_key]
            cell = Cell(run, artefact, tuple(found.get(artefact.key, ())))
            groups[run.configuration, artefact.compression].append(cell)
    return tuple(_row(cells, results.data) for cells in groups.values())


def _training_seconds(cells: list[Cell]) -> Estimate:
    spent = {seed: [c.run.seconds for c in same] for seed, same in by_seed(cells).items()}
    told = [(seed, sum(s for s in seconds if s is not None)) for seed, seconds in spent.items() if None not in seconds]
    return exact(told, reason=TIME_IS_SECRET)


def claims_of(rows: Iterable[Row]) -> tuple[Claim, ...]:
    """Returns what the rows' epsilons are about, each once; more than one cannot all be compared."""
    return tuple(dict.fromkeys(row.claim for row in rows if row.claim is not None))


def artefact_titles(results: Results) -> dict[str, tuple[str, str, int]]:
    """Returns artefact key -> (configuration, compression, seed)."""
    runs = {run.key: run for run in results.runs}
    return {
        artefact.key: (runs[artefact.run_key].configuration, artefact.compression, runs[artefact.run_key].seed)
        for artefact in results.artefacts
        if artefact.run_key in runs
    }


def headline(rows: Iterable[Row]) -> Headline:
    """Returns by which metric and which attack the rows are compared.

    The strongest evaluation is the one of the highest strength; among several the one under which the rows keep the
    least accuracy at their largest common radius. One that no row has a value of comes last, but not where values are
    withheld: rows are not judged by a weaker attack because the stronger one may not be believed. Where a weaker one
    leaves less all the same, the values are marked as bounds.
    """
    rows = list(rows)
    utility = "auroc" if rows and all(row.metric("auroc").value is not None for row in rows) else "accuracy"
    candidates = []
    for name, strength in {a.evaluation: a.strength for row in rows for a in row.attacked}.items():
        radii = [{a.radius for a in row.attacked if a.evaluation == name} for row in rows]
        common = set.intersection(*(found for found in radii if found))
        if common:
            robust = [row.under(name, max(common)).robust for row in rows]
            kept = [each.value for each in robust if each.value is not None]
            mean = sum(kept) / len(kept) if kept else 1.0
            unknown = not kept and not any(each.withheld for each in robust)
            candidates.append((unknown, -strength, mean, name, max(common)))
    if not candidates:
        return Headline(utility, "", 0.0)
    *_, name, radius = min(candidates)
    return Headline(utility, name, radius)


def is_weak(rows: Iterable[Row]) -> bool:
    """Returns whether the rows were attacked, but only in ways after which a stronger attack may well leave less."""
    strengths = {a.strength for row in rows for a in row.attacked}
    return bool(strengths) and max(strengths) < STRONG


def counterpart(
    row: Row, rows: Iterable[Row], fields: Sequence[str], wanted: Callable[[Row], bool]
) -> tuple[Row | None, bool]:
    """Returns the row that differs from `row` only in some fields, and whether it was tuned the same way.

    Args:
        row: The row to compare.
        rows: Where to look; rows of another compression are passed over.
        fields: The fields that differ, such as ["privacy"].
        wanted: What the other row must be, such as: without privacy.
    """
    others = [o for o in rows if o is not row and o.compression == row.compression and wanted(o)]
    for tuned in (False, True):
        for other in others:
            if other.profile(*fields, tuned=tuned) == row.profile(*fields, tuned=tuned):
                return other, not tuned
    return None, False


def _of_run(results: Results, run: Run) -> list[Artefact]:
    return [artefact for artefact in results.artefacts if artefact.run_key == run.key]


def _row(cells: list[Cell], data: tuple[DataFacts, ...]) -> Row:
    first = cells[0].run
    void = dict.fromkeys(reason for cell in cells for reason in void_reasons(cell.artefact))
    budgets = [cell.artefact.guarantee.epsilon for cell in cells]
    epsilons = [value for value in budgets if value is not None]
    claims = [claim for cell in cells if (claim := claim_of(cell.artefact.guarantee))]
    return Row(
        configuration=first.configuration,
        compression=cells[0].artefact.compression,
        spec=_comparable(first.spec),
        seeds=tuple(sorted({cell.run.seed for cell in cells})),
        num_trainings=len(cells),
        clean=_clean(cells, client=None),
        clients=_clients(cells),
        attacked=attacked(cells),
        epsilon=max(epsilons) if len(epsilons) == len(cells) else None,
        claim=max(claims, key=lambda claim: claim.delta) if claims and len(epsilons) == len(cells) else None,
        void=tuple(void) if len(epsilons) < len(cells) else (),
        file_bytes=exact((c.run.seed, float(c.artefact.file_bytes)) for c in cells),
        latency_1=_cost(cells, "latency_batch1_seconds"),
        latency_32=_cost(cells, "latency_batch32_seconds"),
        multiply_adds=_cost(cells, "multiply_adds"),
        bytes_per_round=_bytes_per_round(cells),
        traffic=traffic_of(cells),
        training_seconds=_training_seconds(cells),
        constant=tuple(phrase for cell in cells if (phrase := _constant(cell, data))),
        labels=first.labels,
        triggered=_triggered(cells),
        diagnosed=flags_of(cells),
    )


def void_reasons(artefact: Artefact) -> tuple[str, ...]:
    """Returns why nothing may be claimed of an artefact; empty where its guarantee stands."""
    guarantee = artefact.guarantee
    if guarantee.epsilon is not None:
        return ()
    return guarantee.void or ("no step was accounted for",)


def _comparable(spec: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in spec.items() if name != "seed"}
    if isinstance(kept.get("algorithm"), dict):
        kept["algorithm"] = {name: value for name, value in kept["algorithm"].items() if name != "client"}
    return kept


def _clean(cells: list[Cell], client: str | None) -> dict[str, Estimate]:
    samples: dict[str, list[tuple[int, Measurement]]] = {}
    for cell in cells:
        for m in measured(cell, "clean"):
            if m.client == client and m.radius is None and m.source is None:
                samples.setdefault(m.metric, []).append((cell.run.seed, m))
    return {metric: estimate(of_metric) for metric, of_metric in samples.items()}


def _clients(cells: list[Cell]) -> dict[str, dict[str, Estimate]]:
    names = hospitals(cells)
    repeated = {m.client for cell in cells for m in measured(cell, "clean")}
    there = [*names, *(name for name in WORST if name in repeated)]
    alone = is_alone(cells[0])
    estimates = {}
    for name in there:  # a hospital that trained alone would use its own model
        estimates[name] = _clean([c for c in cells if not is_alone(c) or owner(c, names) == name], client=name)
    if alone:  # the worst is a hospital with its own model
        known = [e for name in names if (e := estimates[name]).get("accuracy", Estimate()).value is not None]
        estimates["worst"] = min(known, key=lambda e: e["accuracy"].value or 0.0, default={})
    return estimates


def _triggered(cells: list[Cell]) -> dict[str, dict[str, Estimate]]:
    samples: dict[str, dict[str, list[tuple[int, Measurement]]]] = {}
    for cell in cells:
        for evaluated in (e for e in cell.evaluated if e.kind == "backdoor"):
            for m in evaluated.measurements:
                samples.setdefault(evaluated.evaluation, {}).setdefault(m.metric, []).append((cell.run.seed, m))
    return {name: {metric: estimate(found) for metric, found in each.items()} for name, each in samples.items()}


def _cost(cells: list[Cell], metric: str) -> Estimate:
    return estimate((cell.run.seed, m) for cell in cells for m in measured(cell, "cost") if m.metric == metric)


def _bytes_per_round(cells: list[Cell]) -> Estimate:
    per_seed = []
    for seed, same in by_seed(cells).items():
        rounds = [r for cell in same for r in cell.run.history if r.get("bytes_up") is not None]
        if rounds:
            per_seed.append((seed, sum(r["bytes_up"] + (r.get("bytes_down") or 0) for r in rounds) / len(rounds)))
    return exact(per_seed, reason=UNSENT)


def _constant(cell: Cell, data: tuple[DataFacts, ...]) -> str:
    """Returns what a model answers for every image, or "" where it tells images apart."""
    values = {m.metric: m.value for m in measured(cell, "clean") if m.client is None}
    sensitivity, specificity = values.get("sensitivity"), values.get("specificity")
    facts = data[0] if len({(d.classes, d.positive_class) for d in data}) == 1 else None
    if sensitivity is None or specificity is None or facts is None:
        return ""
    num_classes = len(facts.classes)
    if num_classes == 2 and {sensitivity, specificity} == {0.0, 1.0}:
        positive = facts.positive_class or facts.classes[1]
        negative = next((name for name in facts.classes if name != positive), "the other class")
        return f"answers “{positive if sensitivity == 1 else negative}” for everything"
    chance = abs(sensitivity - 1 / num_classes) < 1e-9 and abs(specificity - 1 + 1 / num_classes) < 1e-9
    if num_classes > 2 and chance and not values.get("mcc"):
        most = values.get("majority_accuracy") is not None and values.get("accuracy") == values["majority_accuracy"]
        return "answers the most frequent class for everything" if most else "answers one class for everything"
    return ""
