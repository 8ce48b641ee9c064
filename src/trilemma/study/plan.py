"""From a study to its cells: which trainings, artefacts and evaluations there are, each with its key."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from trilemma.attacks.evasion.attack import Attack
from trilemma.compression.specs import CompressionSpec
from trilemma.errors import UserError
from trilemma.evaluation.specs import AllAtOnce, Diagnostics, EvaluationSpec, Transfer
from trilemma.federation.specs import LocalOnly, TrainSpec
from trilemma.privacy.specs import DpSgd
from trilemma.spec import content_key
from trilemma.study.load import validate
from trilemma.study.specs import Study


@dataclass(frozen=True)
class Training:
    """One training of a study.

    Attributes:
        spec: What is trained.
        configuration: The label that its seeds (and the hospitals of `local_only`) share.
        varied: Axis -> label of this training's value.
        key: Content key of the spec.
    """

    spec: TrainSpec
    configuration: str
    varied: dict[str, str]
    key: str

    @property
    def title(self) -> str:
        """Returns what a user calls it: its configuration and what tells it from the others of that."""
        client = getattr(self.spec.algorithm, "client", None)
        where = f", hospital {client + 1}" if client is not None else ""
        return f"{self.configuration}{where}, seed {self.spec.seed}"


@dataclass(frozen=True)
class Cell:
    """One artefact of a study: a training and what its model is turned into.

    Attributes:
        training: Where the model comes from.
        compression: What it is turned into.
        key: Content key of both.
    """

    training: Training
    compression: CompressionSpec
    key: str


@dataclass(frozen=True)
class Plan:
    """Everything that a study asks for.

    Attributes:
        study: The study.
        trainings: In the file's order, seeds innermost; none twice.
        cells: Every training with every compression.
        evaluations: Those of the file, those that an `all_at_once` is made of, and diagnostics for all budgets.
    """

    study: Study
    trainings: tuple[Training, ...]
    cells: tuple[Cell, ...]
    evaluations: tuple[EvaluationSpec, ...]

    def sources(self, target: Cell) -> tuple[Cell, ...]:
        """Returns the artefacts from which attacks are transferred to `target`: all others of its data and seed."""
        own = target.training.spec
        return tuple(
            cell
            for cell in self.cells
            if cell.key != target.key and cell.training.spec.data == own.data and cell.training.spec.seed == own.seed
        )

    def strangers(self, target: Cell) -> tuple[Cell, ...]:
        """Returns the sources that come from another training: what a black-box attacker could have.

        The same training's other compressions are nearly the target itself.
        """
        return tuple(cell for cell in self.sources(target) if cell.training.key != target.training.key)


def make_plan(study: Study, where: str) -> Plan:
    """Returns the cells of a study.

    Args:
        study: The study.
        where: Its file, for messages.

    Raises:
        UserError: If a combination of the grid is no valid training.
    """
    trainings: dict[str, Training] = {}
    for variant in _variants(study, where):
        for seed in study.seeds:
            for training in _expand(variant, seed, where):
                trainings.setdefault(training.key, training)
    _refuse_equal_names(trainings.values(), where)
    cells = tuple(
        Cell(training, compression, content_key(training.key, compression.model_dump(mode="json")))
        for training in trainings.values()
        for compression in study.compressions
    )
    evaluations = dict.fromkeys(study.evaluations)
    for evaluation in study.evaluations:
        if isinstance(evaluation, AllAtOnce):
            evaluations |= dict.fromkeys(evaluation.attacks)
    evaluations |= dict.fromkeys(_diagnostics(tuple(evaluations)))
    return Plan(study, tuple(trainings.values()), cells, tuple(evaluations))


def _diagnostics(evaluations: tuple[EvaluationSpec, ...]) -> list[Diagnostics]:
    """Returns what looks for robustness that is not there, for every budget that is attacked and has none yet."""
    named = {spec.budget for spec in evaluations if isinstance(spec, Diagnostics)}
    attacked = [budget for spec in evaluations if isinstance(spec, (Attack, Transfer)) for budget in spec.budgets]
    wanted = [budget for budget in dict.fromkeys(attacked) if budget not in named]
    return [Diagnostics(norm=budget.norm, radius=budget.radius) for budget in wanted]


def without_guarantee(plan: Plan) -> list[str]:
    """Returns for each artefact that can carry no guarantee what it is and why; one line where it is so for all."""
    reasons = []
    several = len({cell.training.configuration for cell in plan.cells}) > 1
    if several and not any(isinstance(cell.training.spec.privacy, DpSgd) for cell in plan.cells):
        return ["every configuration: training without differential privacy"]
    for cell in plan.cells:
        configuration, compression = cell.training.configuration, cell.compression
        if not isinstance(cell.training.spec.privacy, DpSgd):
            reasons.append(f"{configuration}: training without differential privacy")
        elif compression.private_data:
            reasons.append(f"{configuration}, {compression.label}: {compression.private_data}")
    return reasons


@dataclass(frozen=True)
class _Variant:
    """A training without its seed: raw fields, and for each where in the file it was written."""

    fields: dict[str, Any]
    origin: dict[str, str]
    names: dict[str, str | None]


def _variants(study: Study, where: str) -> list[_Variant]:
    base = _Variant(dict(study.base), {}, {})
    axes = [[_choice(axis, i, value, where) for i, value in enumerate(values)] for axis, values in study.grid.items()]
    grid = [_combine(base, choices) for choices in itertools.product(*axes)]
    extra = []
    for i, fields in enumerate(study.baselines):
        name = fields.get("name") or None
        replaced = {field: value for field, value in fields.items() if field != "name"}
        places = dict.fromkeys(replaced, f"baselines[{i}]")
        names = {"baseline": str(name)} if name else dict.fromkeys(replaced)
        extra.append(_combine(base, [_Variant(replaced, places, names)]))
    return grid + extra


def _choice(axis: str, position: int, value: Any, where: str) -> _Variant:
    place = f"grid.{axis}[{position}]"
    if axis in TrainSpec.model_fields:
        return _Variant({axis: value}, {axis: place}, {axis: None})
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"].strip():
        raise UserError(
            f"{where}: {place}",
            f"'{axis}' is no field of a training, so its values must be tables with a name and the fields they set",
            f'Rename the axis to one of {", ".join(TrainSpec.model_fields)}, or write name = "..." in each value',
        )
    fields = {field: item for field, item in value.items() if field != "name"}
    return _Variant(fields, dict.fromkeys(fields, place), {axis: value["name"]})


def _combine(base: _Variant, choices: list[_Variant] | tuple[_Variant, ...]) -> _Variant:
    fields, origin, names = dict(base.fields), dict(base.origin), dict(base.names)
    for choice in choices:
        fields |= choice.fields
        origin |= choice.origin
        names |= choice.names
    return _Variant(fields, origin, names)


def _expand(variant: _Variant, seed: int, where: str) -> list[Training]:
    """Returns the trainings of a variant for one seed: one, or for `local_only` one for each hospital."""
    if "seed" in variant.fields:
        place = _in_file("seed", variant.origin)
        raise UserError(f"{where}: {place}", "the seed is the study's", "Write seeds = [0, 1, 2] at the top instead")
    spec = _validated({**variant.fields, "seed": seed}, variant.origin, where)
    varied = {axis: name or _label(spec, axis) for axis, name in variant.names.items()}
    shown = [varied[axis] for axis, name in variant.names.items() if name or not _is_none(spec, axis)]
    configuration = ", ".join(shown) or "plain"
    if isinstance(spec.algorithm, LocalOnly) and spec.algorithm.client is None:
        hospitals = range(spec.partition.num_clients)
        specs = [spec.model_copy(update={"algorithm": LocalOnly(client=number)}) for number in hospitals]
    else:
        specs = [spec]
    return [Training(one, configuration, varied, one.key) for one in specs]


def _refuse_equal_names(trainings: Iterable[Training], where: str) -> None:
    """Refuses two different configurations of one name: a report would take them for two seeds of the same."""
    first: dict[str, TrainSpec] = {}
    for training in trainings:
        spec = training.spec.model_copy(update={"seed": 0})
        if isinstance(spec.algorithm, LocalOnly):
            spec = spec.model_copy(update={"algorithm": LocalOnly()})
        if first.setdefault(training.configuration, spec) != spec:
            raise UserError(
                f"{where}: grid and baselines",
                f"two different configurations are both called '{training.configuration}'",
                'Name them apart: write them as tables of [[grid.NAME]] with name = "..." and the fields they set',
            )


def _validated(fields: dict[str, Any], origin: dict[str, str], where: str) -> TrainSpec:
    try:
        return validate(TrainSpec, fields, "")
    except UserError as error:
        place = error.where.removeprefix(": ")
        place = _in_file(place, origin) if place else "base and grid" if origin else "base"
        raise UserError(f"{where}: {place}", error.problem, error.remedy) from None


def _in_file(place: str, origin: dict[str, str]) -> str:
    """Returns where in the study file a place of a training was written."""
    field = place.split(".")[0].split("[")[0]
    axis = origin.get(field, "base")
    return axis + place.removeprefix(field) if axis.startswith(f"grid.{field}[") else f"{axis}.{place}"


def _label(spec: TrainSpec, field: str) -> str:
    value = getattr(spec, field)
    label = value.label if hasattr(value, "label") else f"{field} {value}"
    return f"{label} down" if field == "downlink" else label  # updates may be written in the same way


def _is_none(spec: TrainSpec, field: str) -> bool:
    return getattr(getattr(spec, field, None), "kind", "") == "none"
