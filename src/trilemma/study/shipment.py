"""From one artefact of a store to everything that its recipient should know, and to the file that ships.

The study file is not needed. What trained the model, what it was turned into and what was measured of it stand in the
store's rows, whichever study asked for them and with whatever `--set`; all of it is judged together, so that a number
is believed no more than in any report. Stored studies only say which of several diagnoses of one budget is the newest.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.attack import Attack
from trilemma.compression.packing import zstandard_file
from trilemma.compression.session import Session
from trilemma.compression.shipping import preprocessing_in_words, properties_of, ship_onnx
from trilemma.compression.specs import CompressionSpec
from trilemma.compression.trial import tried
from trilemma.data.specs import Folder, Manifest, Pneumonia
from trilemma.errors import Failure, UserError
from trilemma.evaluation.specs import AllAtOnce, Diagnostics, EvaluationSpec, Transfer
from trilemma.federation.specs import TrainSpec
from trilemma.privacy.guarantee import Guarantee
from trilemma.results import Artefact, DataFacts, Evaluated, Results, Shipment
from trilemma.study.assemble import run_of
from trilemma.study.combine import diagnostics_key
from trilemma.study.facts import facts_key, public_data, public_key
from trilemma.study.files import lost, read_model
from trilemma.study.judgement import ATTACKS, Found, doubts_of, judged
from trilemma.study.load import parse_study
from trilemma.study.plan import Cell, Plan, Training, make_plan
from trilemma.study.rows import ArtefactRow, EvaluationRow
from trilemma.study.specs import Study
from trilemma.study.store import Store

_EVALUATION: TypeAdapter[EvaluationSpec] = TypeAdapter(EvaluationSpec)
_COMPRESSION: TypeAdapter[CompressionSpec] = TypeAdapter(CompressionSpec)

#: Fields of a training that are told in words.
_TOLD = (
    "data", "partition", "model", "pretraining", "teacher", "algorithm", "local", "server", "aggregation", "averaging",
    "defence", "early_stopping", "pruning", "quantisation", "privacy", "threat", "codec", "downlink",
)  # fmt: skip

#: What a key may be made of: it names files of the store.
_KEY = re.compile(r"[A-Za-z0-9]+:[A-Za-z0-9]+")


class _Known(NamedTuple):
    """An artefact as a cell, and the stored studies that ask for it."""

    cell: Cell
    cells: tuple[tuple[Plan, Cell], ...]

    @property
    def training(self) -> Training:
        """Returns where the artefact comes from."""
        return self.cell.training


def shipment(store: Store, row: ArtefactRow) -> tuple[Shipment, bytes, bytes]:
    """Returns what is known of an artefact, the ONNX file that ships, tried against it, and that file for the way.

    Args:
        store: Open.
        row: The artefact.

    Raises:
        Failure: If its file is missing, damaged or another than the store's row is about, its training cannot be read
            by this version, or the file that would ship does not answer as the artefact does.
    """
    known = _known(store, row)
    spec = known.training.spec
    content = _artefact_file(store, row)
    channels, size, _ = Session(content).image_shape
    facts = store.facts(facts_key(known.training))
    classes = facts[0].classes if facts else tuple(f"class {k}" for k in range(Session(content).num_classes))
    words = preprocessing_in_words(channels, size)
    told = {"trilemma.classes": json.dumps(classes), "trilemma.preprocessing": " ".join(words)}
    shipped = ship_onnx(content, told)
    sent = zstandard_file(shipped)
    rows = store.evaluations_of(row.key)
    about = Shipment(
        results=_results(store, row, known, rows, facts[0] if facts else None),
        settings={field: label for field in _TOLD if (label := _label(getattr(spec, field)))},
        compression=_without_label(row.compression),
        looks=known.cell.compression.looks,
        studies=tuple(plan.study.name for plan, _ in known.cells),
        split=spec.data.evaluate_on,
        from_files=isinstance(spec.data, (Folder, Manifest, Pneumonia)),
        channels=channels,
        image_size=size,
        classes=classes,
        preprocessing=words,
        agreement=tried(content, shipped),
        file_bytes=len(shipped),
        sent_bytes=len(sent),
        measured_on={str(each.spec["label"]): each.provenance for each in rows},
    )
    return about, shipped, sent


def _known(store: Store, row: ArtefactRow) -> _Known:
    run = store.run(row.run_key)
    if run is None:
        raise Failure(f"artefact {row.key}", f"its training {row.run_key} is not in the store", _ANOTHER)
    cells = [(plan, cell) for plan in _plans(store) for cell in plan.cells if cell.key == row.key]
    if cells:
        return _Known(cells[0][1], tuple(cells))
    try:
        spec = TrainSpec.model_validate_json(json.dumps(run.spec))
    except ValidationError as error:
        raise _unknown(f"training {run.key}", error) from error
    try:
        compression = _COMPRESSION.validate_json(json.dumps(_without_label(row.compression)))
    except ValidationError as error:
        raise _unknown(f"compression {row.key}", error) from error
    parts = [_label(spec.privacy), _label(spec.defence)]
    return _Known(Cell(Training(spec, ", ".join(filter(None, parts)), {}, run.key), compression, row.key), ())


def _plans(store: Store) -> Iterable[Plan]:
    """Yields the stored studies as they were last run, without `--set`, but those that this version cannot read."""
    for name, *_ in store.studies():
        try:
            yield make_plan(parse_study(store.study_toml(name) or "", name), name)
        except UserError:
            continue


def _artefact_file(store: Store, row: ArtefactRow) -> bytes:
    """Returns the bytes that were measured, as far as the store can tell: size, key and guarantee must be its own."""
    if not _KEY.fullmatch(row.key):
        raise Failure(f"artefact {row.key!r}", "is no key that this program makes", _ANOTHER)
    path: Path = store.files.model(row.key)
    try:
        size = path.stat().st_size
        content = read_model(path) if size == row.file_bytes else b""
    except OSError as error:
        raise lost(path, error.strerror or str(error)) from error
    if size != row.file_bytes:
        raise lost(path, f"it has {size} bytes, and the artefact had {row.file_bytes}")
    try:
        told = properties_of(content)
        guarantee = Guarantee.model_validate_json(told.get("trilemma.guarantee", row.guarantee.model_dump_json()))
    except (Failure, ValidationError) as error:
        raise lost(path, error.problem if isinstance(error, Failure) else "its guarantee is none") from error
    if told.get("trilemma.key", row.key) != row.key or guarantee != row.guarantee:
        raise lost(path, "it says of itself that it is another artefact")
    return content


def _results(
    store: Store, row: ArtefactRow, known: _Known, rows: Sequence[EvaluationRow], facts: DataFacts | None
) -> Results:
    training = known.training
    run = run_of(training, store, [])
    assert run is not None  # `_known` has read it
    label = str(row.compression["label"])
    study = known.cells[0][0].study if known.cells else None
    alone = Plan(study or Study(name="none", question="none"), (training,), (known.cell,), ())
    public = [store.facts(public_key(data)) for data in public_data(alone)]
    return Results(
        name=study.name if study else "",
        question=study.question if study else "",
        study_toml="",
        seeds=(training.spec.seed,),
        data=(facts,) if facts else (),
        runs=(run,),
        artefacts=(Artefact(row.key, row.run_key, label, row.file_bytes, row.sparsity, row.guarantee),),
        evaluated=tuple(_evaluated(known, rows)),
        environment=run.provenance,
        public=tuple(each[0] for each in public if each),
    )


def _evaluated(known: _Known, rows: Sequence[EvaluationRow]) -> list[Evaluated]:
    """Returns what was measured, judged by all of it; of several worst transfers that which leaves the least."""
    found = [_found(row) for row in rows]
    diagnosed = _diagnosed(known, found, {row.key: row for row in rows})
    counted = {row.key for _, row in diagnosed if row}
    doubts = doubts_of(diagnosed)
    found = [each for each in found if not isinstance(each.spec, Diagnostics) or each.key in counted]
    shown = list(zip(found, judged(found, doubts), strict=True))
    least: dict[str, str] = {}
    for each in sorted((each for each in found if _is_worst(each)), key=_left):
        least.setdefault(each.spec.key, each.key)
    return [told for each, told in shown if not _is_worst(each) or least[each.spec.key] == each.key]


def _found(row: EvaluationRow) -> Found:
    try:
        spec = _EVALUATION.validate_json(json.dumps(_without_label(row.spec)))
    except ValidationError as error:  # leaving it out might leave out why another number is withheld
        raise _unknown(f"evaluation {row.key}", error) from error
    label = str(row.spec["label"]) if isinstance(spec, Attack) else spec.label
    return Found(row.key, spec, Evaluated(row.artefact_key, label, spec.kind, row.measurements, row.seconds))


def _diagnosed(
    known: _Known, found: Sequence[Found], rows: dict[str, EvaluationRow]
) -> list[tuple[Budget, EvaluationRow | None]]:
    """Returns the diagnoses that count: of each budget those that stored studies ask for, or else all that there are.

    A budget that was attacked and never diagnosed has None.
    """
    asked: dict[Budget, dict[str, None]] = {}
    for plan, cell in known.cells:
        for spec in plan.evaluations:
            if isinstance(spec, Diagnostics):
                asked.setdefault(spec.budget, {})[diagnostics_key(plan, cell, spec)] = None
    there: dict[Budget, dict[str, None]] = {}
    for each in found:
        if isinstance(each.spec, Diagnostics):
            there.setdefault(each.spec.budget, {})[each.key] = None
    attacked = [budget for each in found if isinstance(each.spec, ATTACKS) for budget in each.spec.budgets]
    pairs: list[tuple[Budget, EvaluationRow | None]] = []
    for budget in dict.fromkeys([*there, *attacked]):
        keys = asked.get(budget) or there.get(budget) or {"": None}
        pairs += [(budget, rows.get(key)) for key in keys]
    return pairs


def _without_label(spec: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in spec.items() if name != "label"}


def _is_worst(found: Found) -> bool:
    """Returns whether an evaluation depends on which other artefacts its study had, so that there may be several."""
    if not isinstance(found.spec, (Transfer, AllAtOnce)):
        return False
    return any(m.metric == "robust_accuracy" and m.source is None for m in found.evaluated.measurements)


def _left(found: Found) -> float:
    robust = [m for m in found.evaluated.measurements if m.metric == "robust_accuracy" and m.source is None]
    return sum(1.0 if m.value is None else m.value for m in robust)


def _label(value: Any) -> str:
    """Returns what a field of a training is called; "" for none and for what has no name."""
    if value is None or getattr(value, "kind", "") == "none":
        return ""
    return str(getattr(value, "label", "") or getattr(value, "kind", "")).replace("_", " ")


_ANOTHER = "Put the store back from a copy, or name another folder with --store"


def _unknown(where: str, error: ValidationError) -> Failure:
    problem = f"this version cannot read its settings ({error.errors()[0]['msg'].lower()})"
    return Failure(where, problem, "Export it with the version that ran it; the store names that")
