"""What a job hands to the store: everything that is known of one finished piece of work."""

from dataclasses import dataclass, field
from typing import Any

from trilemma.evaluation.measurement import Measurement, Outcome
from trilemma.privacy.guarantee import Guarantee
from trilemma.results import Example
from trilemma.study.lineage import Lineage


@dataclass(frozen=True)
class RunRow:
    """A training that ended: the fields of `trilemma.results.Run`, the data's fingerprint, and what paid for it."""

    key: str
    spec: dict[str, Any]
    history: list[dict[str, Any]]
    guarantee: Guarantee
    provenance: dict[str, Any]
    fingerprint: str
    seconds: float
    peak_memory_bytes: int
    num_parameters: int
    lineage: Lineage = field(default_factory=Lineage)


@dataclass(frozen=True)
class ArtefactRow:
    """An artefact whose files are written; the fields are those of `trilemma.results.Artefact`."""

    key: str
    run_key: str
    compression: dict[str, Any]
    file_bytes: int
    sparsity: float
    guarantee: Guarantee
    seconds: float


@dataclass(frozen=True)
class EvaluationRow:
    """An evaluation that ended, with all that it found."""

    key: str
    artefact_key: str
    spec: dict[str, Any]
    provenance: dict[str, Any]
    seconds: float
    measurements: tuple[Measurement, ...]
    outcomes: tuple[Outcome, ...] = ()
    examples: tuple[Example, ...] = ()
