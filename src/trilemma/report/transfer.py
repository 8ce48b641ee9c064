"""The transfer matrix: what images made on one configuration do to another."""

from collections.abc import Iterable
from dataclasses import dataclass

from trilemma.report.configurations import artefact_titles
from trilemma.results import Results


@dataclass(frozen=True)
class Transfer:
    """Robust accuracy of targets on images made on sources, under one evaluation at one radius.

    Attributes:
        evaluation: The evaluation's label.
        radius: In pixel units, the largest that it holds.
        sources: Row titles.
        targets: Column titles.
        values: One tuple per source, one value per target: the mean over all pairs of seeds, or None where no
            pair was attacked.
        same_training: For each value, whether files of one training are among its pairs: these are nearly the same
            model, and no black-box attacker has one.
        withheld: For each target why its values are withheld, or "": whether a model is robust is asked of the one
            that is attacked.
    """

    evaluation: str
    radius: float
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    same_training: tuple[tuple[bool, ...], ...]
    withheld: tuple[str, ...]


def transfer_matrices(results: Results) -> tuple[Transfer, ...]:
    """Returns a matrix for every transfer evaluation, in the study's order."""
    titles = {key: f"{configuration}, {comp}" for key, (configuration, comp, _) in artefact_titles(results).items()}
    labels = dict.fromkeys(e.evaluation for e in results.evaluated if e.kind == "transfer")
    matrices = (_matrix(results, label, titles) for label in labels)
    return tuple(matrix for matrix in matrices if matrix is not None)


def _matrix(results: Results, label: str, titles: dict[str, str]) -> Transfer | None:
    trainings = {artefact.key: artefact.run_key for artefact in results.artefacts}
    samples = [
        (m.radius, m.source, e.artefact_key, m)
        for e in results.evaluated
        if e.kind == "transfer" and e.evaluation == label and e.artefact_key in titles
        for m in e.measurements
        if m.metric == "robust_accuracy" and m.source is not None and m.radius is not None
        if m.value is not None or m.status == "withheld"
    ]
    if not samples:
        return None
    radius = max(sample[0] for sample in samples)
    pairs: dict[tuple[str, str], list[float]] = {}
    twins, doubts = set(), {}
    for its_radius, source, target, m in samples:
        if its_radius == radius:
            pair = titles.get(source, "a model outside this study"), titles[target]
            pairs.setdefault(pair, [])
            if m.value is None:
                doubts.setdefault(titles[target], m.reason)
            else:
                pairs[pair].append(m.value)
            if trainings.get(source) == trainings[target]:
                twins.add(pair)
    sources = _ordered((source for source, _ in pairs), titles.values())
    targets = _ordered((target for _, target in pairs), titles.values())
    values = tuple(
        tuple(None if target in doubts else _mean(pairs.get((source, target))) for target in targets)
        for source in sources
    )
    same = tuple(tuple((source, target) in twins for target in targets) for source in sources)
    withheld = tuple(doubts.get(target, "") for target in targets)
    return Transfer(label, radius, sources, targets, values, same, withheld)


def _ordered(found: Iterable[str], order: Iterable[str]) -> tuple[str, ...]:
    places = {title: place for place, title in reversed(list(enumerate(order)))}
    return tuple(sorted(set(found), key=lambda title: (places.get(title, len(places)), title)))


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
