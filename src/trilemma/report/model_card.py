"""The card of one model that ships, as Mitchell et al. (2019, arXiv 1810.03993) ask for: for people and for programs.

It says what the store says and nothing else. Numbers are judged as in every report: what the diagnostics withhold is
withheld here, what is known to be too high is marked "≤", and what nobody measured is "not measured", never a zero.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trilemma.compression.step import Looks
from trilemma.report import numbers
from trilemma.report.before_use import before_use, void_privacy
from trilemma.report.cells import WORST, Cell, hospitals, measured
from trilemma.report.claims import claim_of
from trilemma.report.configurations import Row, configuration_rows, void_reasons
from trilemma.report.estimates import Estimate, estimate
from trilemma.report.export import finite, markdown, measurement_rows
from trilemma.report.flags import raised_in_words, why_withheld
from trilemma.report.markup import clean
from trilemma.results import DataFacts, Shipment

#: What a card has a line for, measured or not.
_METRICS = (
    "accuracy", "balanced_accuracy", "auroc", "mcc", "sensitivity", "specificity", "expected_calibration_error",
    "majority_accuracy",
)  # fmt: skip
_SPLITS = {"test": "test images", "val": "validation images, in the place of the test images"}
_NOT_MEASURED = "not measured"


def card_markdown(shipped: Shipment) -> str:
    """Returns the card as Markdown."""
    row = configuration_rows(shipped.results)[0]
    artefact = shipped.results.artefacts[0]
    parts = [
        f"# Model card of {markdown(artefact.key)}",
        _opening(shipped, row),
        _section("Model", _table(("", ""), _model(shipped))),
        _section("Use", _bullets(_uses(shipped))),
        _section("Input and output", _bullets(_input(shipped))),
        _section("Data", *_data(shipped)),
        _section("What it is worth", *_quality(shipped, row)),
        _section("Hospital by hospital", *_by_hospital(shipped)),
        _section("Robustness", *_robustness(row)),
        _section("Privacy", *map(_paragraph, [_guarantee(shipped), *_about_card(shipped)])),
        _section("Size and speed", _table(("", ""), _cost(shipped, row))),
        _section("Where the numbers come from", _table(("", ""), _environment(shipped))),
    ]
    return clean("\n\n".join(parts)) + "\n"


def card_json(shipped: Shipment) -> str:
    """Returns the card as JSON; missing is null, with a status and a reason."""
    results, run, artefact = shipped.results, shipped.results.runs[0], shipped.results.artefacts[0]
    claim = claim_of(artefact.guarantee)
    content = {
        "card": 1,
        "key": artefact.key,
        "training": run.key,
        "studies": list(shipped.studies),
        "seed": run.seed,
        "settings": shipped.settings,
        "spec": _without_folders(run.spec),
        "chosen_round": run.chosen_round,
        "num_parameters": run.num_parameters,
        "compression": _without_folders(shipped.compression)
        | {"label": artefact.compression, "sparsity": artefact.sparsity},
        "classes": list(shipped.classes),
        "input": {"name": "image", "dtype": "uint8", "channels": shipped.channels, "resized_to": shipped.image_size},
        "outputs": ["logits", "probabilities"],
        "preprocessing": list(shipped.preprocessing),
        "agreement": shipped.agreement._asdict(),
        "file_bytes": {
            "model.onnx": shipped.file_bytes,
            "model.onnx.zst": shipped.sent_bytes,
            "artefact": artefact.file_bytes,
        },
        "guarantee": artefact.guarantee.model_dump(mode="json"),
        "guarantee_in_words": _guarantee(shipped),
        "epsilon": artefact.guarantee.epsilon,
        "epsilon_is_for": claim.in_words if claim else None,
        "data": [_facts(each) for each in results.data],
        "public_data": [_facts(each) for each in results.public],
        "measured_on_split": shipped.split,
        "measurements": [
            {name: value for name, value in each.items() if name not in ("study", "artefact", "configuration")}
            for each in measurement_rows(results)
            if each["metric"] != "training_seconds"
        ],
        "limits": before_use(shipped, configuration_rows(results)[0]),
        "uses": _uses(shipped),
        "trained_on": run.provenance,
        "measured_on": shipped.measured_on,
    }
    return clean(json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False, default=str)) + "\n"


def _without_folders(value: Any) -> Any:
    """Returns a spec in which a place on somebody's disk is its last part only: the rest is nobody else's business."""
    if isinstance(value, dict):
        return {
            name: Path(item).name if name in ("path", "folder") and isinstance(item, str) else _without_folders(item)
            for name, item in value.items()
        }
    return [_without_folders(item) for item in value] if isinstance(value, list) else value


def _facts(facts: DataFacts) -> dict[str, Any]:
    return {
        "name": facts.name,
        "source": facts.source,
        "synthetic": facts.synthetic,
        "classes": list(facts.classes),
        "positive_class": facts.positive_class or None,
        "num_records": facts.num_records,
        "clients": facts.clients,
        "warnings": list(facts.warnings),
    }


# Markdown from rows of text; everything that comes from a store is escaped here and nowhere else.


def _section(title: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", *filter(None, parts)])


def _paragraph(text: str) -> str:
    return markdown(text)


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {markdown(sentence)}" for sentence in sentences)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles)]
    written = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*written, *("| " + " | ".join(map(markdown, row)) + " |" for row in rows)])


def _number(metric: str, found: Estimate) -> str:
    """Returns a value with its interval, or in its place why there is none; never a zero for what is missing."""
    if found.value is None:
        return f"withheld: {found.reason}" if found.withheld else found.reason or _NOT_MEASURED
    return numbers.metric_estimate(metric, found)


def _opening(shipped: Shipment, row: Row) -> str:
    what = f"A classifier of {shipped.settings.get('data', 'images')} into {', '.join(shipped.classes)}"
    said = markdown(f"{what}, as “{row.title}”. Written by Trilemma from its store; nobody has edited it.")
    limits = before_use(shipped, row)
    return f"{said}\n\n**Before it is used:**\n\n{_bullets(limits)}" if limits else said


def _model(shipped: Shipment) -> list[Sequence[str]]:
    results, run, artefact = shipped.results, shipped.results.runs[0], shipped.results.artefacts[0]
    versions = run.provenance.get("versions", {})
    told = [
        ("artefact", artefact.key),
        ("training", run.key),
        ("asked for by the study", ", ".join(shipped.studies) or "none that the store holds as it was last run"),
        ("question of that study", results.question or "not recorded"),
        *((name.replace("_", " "), label) for name, label in shipped.settings.items()),
        ("privacy", shipped.settings.get("privacy", "none") + ("; void, see Privacy" if void_privacy(shipped) else "")),
        ("defence", shipped.settings.get("defence", "none")),
        ("malicious hospitals", shipped.settings.get("threat", "none")),
        ("rounds", _rounds(run.spec)),
        ("round that became the model", str(run.chosen_round or "the last")),
        ("seed", str(run.seed)),
        ("parameters", str(run.num_parameters)),
        ("compression", f"{artefact.compression}; {_looked_at(shipped)}"),
        ("weights that are zero", numbers.percent(artefact.sparsity)),
        ("classes, in the order of the answers", ", ".join(shipped.classes)),
        ("revision", str(run.provenance.get("git_revision") or "not recorded")),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items()) or "not recorded"),
    ]
    return list({name: (name, value) for name, value in told if name != "threat"}.values())


def _rounds(spec: dict[str, Any]) -> str:
    """Returns the rounds of a training; a guarantee counts the steps of its teacher's too."""
    own, teacher = str(spec.get("rounds", "not recorded")), spec.get("teacher") or {}
    return f"{own}, after {teacher.get('rounds')} of its teacher, whose steps the guarantee counts" if teacher else own


def _looked_at(shipped: Shipment) -> str:
    if not shipped.looks:
        return "no image was read for it"
    return "it looked at " + ", and at ".join(f"up to {each.count} images: {_whose(each)}" for each in shipped.looks)


def _whose(looks: Looks) -> str:
    if looks.private:
        return f"private ones of the split “{looks.source}”"
    if looks.data is not None:
        return f"those of {looks.data.title}, taken for public"
    return "made from the model alone" if looks.source == "synthetic" else "public phantoms, no patient's"


def _uses(shipped: Shipment) -> list[str]:
    return [
        "Meant for research into private, robust and small classifiers, and for trials of them by people who can "
        "judge an answer without it.",
        "It is NOT a medical device. No authority has approved it, and no diagnosis or treatment may rest on it.",
        f"Only images like those it was measured on ({shipped.settings.get('data', 'see Data')}) are covered by these "
        "numbers: not another device, population, projection or disease, and no class but those named above.",
        "Nothing that this card calls not measured may be assumed. Groups of patients (age, sex, origin) are not "
        "recorded in the store, so that fairness between them is not measured.",
        "It answers every image, also one that shows nothing it knows; it cannot say that it does not know.",
    ]


def _input(shipped: Shipment) -> list[str]:
    agreement = shipped.agreement
    sizes = ", ".join(f"{height} x {width}" for height, width in agreement.sizes)
    grey = ["A colour file must be made grey first, by the luma of ITU-R 601 (Pillow: convert('L'))."]
    came = (
        "The images that it was trained and measured on were resized the same way, by Pillow; JPEGs larger than "
        f"{2 * shipped.image_size} pixels were decoded at a reduced scale (Pillow's draft), and should be here."
        if shipped.from_files
        else f"The images that it was trained and measured on came with {shipped.image_size} x {shipped.image_size} "
        "pixels. How theirs were made smaller is not repeated here, so that accuracy on files of other sizes is not "
        "measured."
    )
    return [
        *shipped.preprocessing,
        *(grey if shipped.channels == 1 else []),
        "Before that the file must be turned as its EXIF says and, where it is transparent, laid on black. Files of "
        "more than 8 bits and DICOM must be brought to 8 bits by whoever reads them: what that costs is not measured.",
        came,
        f"Agreement with Pillow's resizing and the measured file, tried when this folder was written: on images of "
        f"the model's own size logits differ by at most {agreement.own_size:.2g}; on {agreement.num_images} synthetic "
        f"images of other sizes ({sizes}) a probability differs by at most {agreement.largest:.2g}, for a pixel may be "
        "rounded to the next level.",
        "Output “logits” and “probabilities” (their softmax), float32, shape (N, classes).",
    ]


def _data(shipped: Shipment) -> list[str]:
    if not shipped.results.data:
        return [_paragraph("What the data are is not recorded in the store.")]
    facts = shipped.results.data[0]
    records = ", ".join(f"{number} {split}" for split, number in facts.num_records.items())
    about = [
        ("data set", facts.name),
        ("source", facts.source),
        ("synthetic", "yes" if facts.synthetic else "no"),
        ("images", records),
        ("counted as positive", facts.positive_class or "no class"),
        ("measured on", _SPLITS.get(shipped.split, shipped.split)),
        *(("public images too", f"{each.name}: {each.source}") for each in shipped.results.public),
    ]
    titles = ("hospital", "training images", "patients", *map(markdown, facts.classes))
    names = ("client", "records", "patients")
    rows = [(*(_written(each.get(name)) for name in names), *_counts(each, facts)) for each in facts.clients]
    return [_table(("", ""), about), _table(titles, rows) if rows else "", _bullets(facts.warnings)]


def _counts(client: dict[str, Any], facts: DataFacts) -> list[str]:
    return [str(client.get("classes", {}).get(name, "not recorded")) for name in facts.classes]


def _cell(shipped: Shipment) -> Cell:
    return Cell(shipped.results.runs[0], shipped.results.artefacts[0], shipped.results.evaluated)


def _quality(shipped: Shipment, row: Row) -> list[str]:
    lead = f"On the {_SPLITS.get(shipped.split, shipped.split)}, with 95 % intervals over patients."
    rows = [_line(metric, row.metric(metric)) for metric in _METRICS]
    more = [
        [f"{metric.replace('_', ' ')}, {name}", _number(metric, found), str(found.n or "")]
        for name, each in row.triggered.items()
        for metric, found in each.items()
    ]
    return [_paragraph(lead), _table(("metric", "value", "images"), [*rows, *more])]


def _line(metric: str, found: Estimate) -> list[str]:
    return [numbers.metric_title(metric), _number(metric, found), str(found.n or "")]


def _by_hospital(shipped: Shipment) -> list[str]:
    cell = _cell(shipped)
    of = {name: _of_client(cell, name) for name in [*hospitals([cell]), *WORST]}
    malicious = "threat" in shipped.settings
    worst = of["worst honest"] if malicious else of["worst"]
    rows = [
        [name, _number("accuracy", found["accuracy"]), _number("auroc", found["auroc"]), str(found["accuracy"].n or "")]
        for name, found in of.items()
        if name not in WORST
    ]
    last = ["worst honest hospital", _number("accuracy", worst["accuracy"]), _number("auroc", worst["auroc"])]
    rows.append([*last, str(worst["accuracy"].n or "")])
    told = "" if len(rows) > 1 else _paragraph("No hospital was measured by itself.")
    return [told, _table(("hospital", "accuracy", "AUROC", "images"), rows)]


def _of_client(cell: Cell, name: str) -> dict[str, Estimate]:
    found = [m for m in measured(cell, "clean") if m.client == name and m.radius is None]
    return {
        metric: estimate((cell.run.seed, m) for m in found if m.metric == metric) for metric in ("accuracy", "auroc")
    }


def _robustness(row: Row) -> list[str]:
    if not row.attacked:
        return [_paragraph("Not measured: no attack on this model is in the store. Nothing may be assumed.")]
    lead = (
        "Share of images that are answered rightly both before and after an attack. Radii are in pixel units of the "
        "resized image, in [0, 1]. No number here is a proof: a stronger attack may leave less."
    )
    rows = [
        [at.evaluation, numbers.radius(at.radius), numbers.metric_estimate("robust_accuracy", at.robust),
         _status(at.robust, row), str(at.robust.n or "")]
        for at in row.attacked
    ]  # fmt: skip
    raised = raised_in_words(row.diagnosed)
    signs = (
        f"Signs that the robustness is not there: {raised}." if raised
        else "Signs that the robustness is not there were looked for, and none was seen." if row.diagnosed
        else "Nobody has looked for signs that the robustness is not there."
    )  # fmt: skip
    titles = ("attack", "radius", "robust accuracy", "status", "images")
    return [_paragraph(lead), _table(titles, rows), _paragraph(signs)]


def _status(found: Estimate, row: Row) -> str:
    if found.withheld:
        return f"withheld: {why_withheld(found, row.diagnosed)}"
    if found.value is None:
        return f"no value: {found.reason or _NOT_MEASURED}"
    return f"bound: {found.reason}" if found.bound else "measured"


def _guarantee(shipped: Shipment) -> str:
    artefact = shipped.results.artefacts[0]
    void = void_reasons(artefact)
    return f"No guarantee: {'; '.join(void)}." if void else artefact.guarantee.in_words()


def _about_card(shipped: Shipment) -> list[str]:
    guarantee = shipped.results.artefacts[0].guarantee
    said = ["The guarantee is about the model. What this card says of the data, and its metrics, is not covered by it."]
    if guarantee.unit == "client":
        said[0] += " It names hospitals and counts their images: give it to those only who may know who took part."
    return said if guarantee.epsilon is not None else []


def _cost(shipped: Shipment, row: Row) -> list[Sequence[str]]:
    cpu = shipped.measured_on.get("cost", {}).get("cpu")
    where = f" (median and quartiles; one thread; {cpu})" if cpu else ""
    return [
        ("model.onnx, with its preprocessing", f"{shipped.file_bytes} bytes"),
        ("model.onnx.zst, the same for the way", f"{shipped.sent_bytes} bytes"),
        ("the artefact as the store keeps it and reports count it", f"{shipped.results.artefacts[0].file_bytes} bytes"),
        ("multiply-adds for 1 image", _count(row.multiply_adds)),
        ("time for 1 image, without preprocessing", _seconds(row.latency_1) + (where if row.latency_1.value else "")),
        ("time for 32 images, without", _seconds(row.latency_32)),
        ("time with preprocessing", _NOT_MEASURED),
    ]


def _count(found: Estimate) -> str:
    return numbers.count(found.value) if found.value is not None else found.reason or _NOT_MEASURED


def _seconds(found: Estimate) -> str:
    if found.value is None:
        return found.reason or _NOT_MEASURED
    if found.low is None or found.high is None:
        return numbers.duration(found.value)
    return f"{numbers.duration(found.value)} ({numbers.duration(found.low)} to {numbers.duration(found.high)})"


def _environment(shipped: Shipment) -> list[Sequence[str]]:
    told = shipped.results.runs[0].provenance
    names = ("platform", "python", "cpu", "cpu_flags", "device", "threads")
    rows: list[Sequence[str]] = [(f"training: {name}", _written(told.get(name))) for name in names]
    cpus = dict.fromkeys(_written(each.get("cpu")) for each in shipped.measured_on.values())
    return [*rows, ("measurements: cpu", "; ".join(cpus) or _NOT_MEASURED)]


def _written(value: Any) -> str:
    if value is None or value == "":
        return "not recorded"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
