"""The study: one file, one question."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from trilemma.compression.specs import CompressionSpec, NoCompression
from trilemma.evaluation.specs import Clean, EvaluationSpec
from trilemma.spec import Spec


class Study(Spec):
    """A question, the trainings that answer it, and what is done with their models.

    Attributes:
        name: Names the report: lower-case letters, digits, "-" and "_".
        question: In one sentence, as the report shows it.
        seeds: One training of every configuration for each.
        base: A training's fields, shared by all.
        grid: Axis -> values; every combination is trained. An axis named like a field of a training replaces that
            field, whole; any other axis bundles fields, in tables with a `name` and the fields that they set.
        baselines: Further configurations beside the grid: each is the base with the given fields replaced.
        compressions: What every trained model is turned into.
        evaluations: What is measured of every artefact.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    question: str = Field(min_length=1, max_length=500)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    base: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    baselines: list[dict[str, Any]] = []
    compressions: tuple[CompressionSpec, ...] = Field(default=(NoCompression(),), min_length=1)
    evaluations: tuple[EvaluationSpec, ...] = Field(default=(Clean(),), min_length=1)

    @model_validator(mode="after")
    def _nothing_twice(self) -> "Study":
        for field in ("seeds", "compressions", "evaluations"):
            values = getattr(self, field)
            if len(set(map(repr, values))) < len(values):
                raise ValueError(f"{field} names the same thing twice")
        called = [compression.label for compression in self.compressions]
        for label in called:
            if called.count(label) > 1:
                raise ValueError(
                    f"two compressions are called “{label}”, and a report could not tell them apart: leave one of them "
                    "out, or change what its name holds"
                )
        labels = [evaluation.label for evaluation in self.evaluations if evaluation.kind != "diagnostics"]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f"two evaluations are called “{label}”, and a report could not tell them apart: give one of them "
                    "all radii, or name another attack"
                )
        for axis, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{axis} is empty; give at least one value or leave the axis out")
        return self
