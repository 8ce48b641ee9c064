"""One training, one artefact of it, and everything that was measured of that: what the rows of a report are made of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trilemma.evaluation.measurement import Measurement
from trilemma.results import Artefact, Evaluated, Run

#: Names under which clean metrics repeat those of a hospital: the worst of all, and of those that are not malicious.
WORST = ("worst", "worst honest")


@dataclass(frozen=True)
class Cell:
    """One artefact with its training and its measurements.

    Attributes:
        run: The training.
        artefact: What ships.
        evaluated: Every evaluation of the artefact.
    """

    run: Run
    artefact: Artefact
    evaluated: tuple[Evaluated, ...]


def measured(cell: Cell, kind: str) -> list[Measurement]:
    """Returns what all evaluations of one kind measured of an artefact."""
    return [m for evaluated in cell.evaluated if evaluated.kind == kind for m in evaluated.measurements]


def by_seed(cells: Iterable[Cell]) -> dict[int, list[Cell]]:
    """Returns seed -> its cells, several where each hospital trained alone; seeds in ascending order."""
    cells = list(cells)
    return {seed: [c for c in cells if c.run.seed == seed] for seed in sorted({c.run.seed for c in cells})}


def hospitals(cells: Iterable[Cell]) -> list[str]:
    """Returns the names of the hospitals on whose test images the cells were judged, in their order."""
    names = dict.fromkeys(m.client for cell in cells for m in measured(cell, "clean") if m.client is not None)
    return [name for name in names if name not in WORST]


def is_alone(cell: Cell) -> bool:
    """Returns whether a hospital trained this model alone."""
    algorithm = cell.run.spec.get("algorithm")
    return isinstance(algorithm, dict) and algorithm.get("kind") == "local_only"


def owner(cell: Cell, names: Sequence[str]) -> str:
    """Returns which of the hospitals trained a model alone, or "" where it is nobody's own or cannot be told."""
    if not is_alone(cell):
        return ""
    index = cell.run.spec["algorithm"].get("client")
    return names[index] if isinstance(index, int) and 0 <= index < len(names) else ""
