"""The study's answer in words, drawn from its numbers by fixed rules.

Every sentence names its numbers and their intervals. Where the interval of a difference includes zero, it says
that no difference can be shown, and not that there is none.
"""

from collections.abc import Callable, Sequence

from trilemma.report import numbers
from trilemma.report.cells import WORST
from trilemma.report.comparisons import Pair, admitting, change, named, pairs, side_by_side
from trilemma.report.configurations import UNCOMPRESSED, Headline, Row, configuration_rows, headline
from trilemma.report.doubts import doubts
from trilemma.report.estimates import Estimate, averaged, difference
from trilemma.report.finding import Finding
from trilemma.report.poisoning import backdoor_sentences, poisoning_findings
from trilemma.report.verdict import attack, verdict
from trilemma.results import Results

#: Comparisons of one kind that are written out; the others stand in the table.
MOST_PAIRS = 3

#: Hospitals that are written out one by one; the others stand in the table.
MOST_HOSPITALS = 6

_KEPT = "of the right answers survive"
_PAYS = {1: "collaboration is worth it", -1: "collaboration did not pay", 0: "it is open whether collaboration pays"}


def answer(results: Results) -> tuple[Finding, ...]:
    """Returns the answer: what limits it, the verdict, then one paragraph per question that the study can answer."""
    rows = configuration_rows(results)
    if not rows:
        return (*_limits(results, rows), Finding("No answer yet", ("Nothing has been measured.",), caution=True))
    by = headline(rows)
    findings = [
        *_limits(results, rows),
        *doubts(rows, by),
        *poisoning_findings(results, rows),
        Finding("Private, robust and scalable at once?", (verdict(rows, by),)),
        *_constant(rows),
        *_collaboration(rows, by),
        *_privacy(rows, by),
        *_defence(rows, by),
        *_together(rows, by),
        *_fragility(rows, by),
        *_compression(rows),
        *_threat(rows, by),
    ]
    return tuple(findings)


def _limits(results: Results, rows: Sequence[Row]) -> list[Finding]:
    found = []
    if any(facts.synthetic for facts in results.data):
        whole = "The images are" if all(facts.synthetic for facts in results.data) else "Some of the images are"
        found.append(
            Finding(
                "Synthetic images",
                (
                    f"{whole} synthetic: computed and not taken of patients. The numbers show how the methods behave, "
                    "not how they would do in a hospital.",
                ),
                caution=True,
            )
        )
    if results.missing:
        num = len(results.missing)
        cells = "one cell of the study is" if num == 1 else f"{num} cells of the study are"
        text = f"The study is unfinished: {cells} missing (listed below). What follows rests on what is there."
        found.append(Finding("Unfinished", (text,), caution=True))
    if rows and max(len(row.seeds) for row in rows) == 1:
        text = "One seed each: the intervals speak of other test images, not of another training of the same kind."
        found.append(Finding("One seed", (text,), caution=True))
    if any(row.epsilon is not None and _seeded(row) for row in rows):
        text = (
            "The noise comes from a seed: each ε, and with it “private”, is a statement about the method and no "
            'ground for releasing one of these models. For that, train with noise = "system".'
        )
        found.append(Finding("Seeded noise", (text,), caution=True))
    return found


def _seeded(row: Row) -> bool:
    privacy = row.spec.get("privacy")
    return isinstance(privacy, dict) and privacy.get("noise", "seeded") == "seeded"


def _constant(rows: Sequence[Row]) -> list[Finding]:
    found = []
    for label in dict.fromkeys(row.configuration for row in rows):
        same = [row for row in rows if row.configuration == label]
        phrases = [phrase for row in same for phrase in row.constant]
        trained = sum(row.num_trainings for row in same)
        behind = [row for row in same if _at_most_majority(row)]
        if phrases:
            text = (
                f"“{label}” {' and '.join(dict.fromkeys(phrases))} ({len(phrases)} of its {trained} models). Its "
                "accuracy is that class's share of the images, and its robustness that of a constant."
            )
            found.append(Finding("A constant answer", (text,), caution=True))
        elif behind:
            row = behind[0]
            text = (
                f"“{row.title}” is right on {numbers.metric_estimate('accuracy', row.metric('accuracy'))} of the "
                f"images, no more than always giving the most frequent answer ({numbers.percent(row.majority or 0)})."
            )
            found.append(Finding("No better than a constant", (text,), caution=True))
    return found


def _at_most_majority(row: Row) -> bool:
    accuracy = row.metric("accuracy").value
    return accuracy is not None and row.majority is not None and accuracy <= row.majority


def _collaboration(rows: Sequence[Row], by: Headline) -> list[Finding]:
    def federated(row: Row) -> bool:
        return row.kind("algorithm") not in ("local_only", "centralised")

    texts = []
    alone = pairs(rows, ["algorithm"], federated, lambda row: row.kind("algorithm") == "local_only")
    for pair in alone[:MOST_PAIRS]:
        texts += [_on_own_patients(pair, by), _on_everybodys_patients(pair, by)]
    pooled = pairs(rows, ["algorithm"], federated, lambda row: row.kind("algorithm") == "centralised")
    for pair in pooled[:MOST_PAIRS]:
        effect = change(pair, by.utility)
        if effect is not None:
            texts.append(f"“{pair.changed.configuration}” against pooling all images in one place: {effect.sentence}")
    return _finding("Is collaboration worth it?", texts, len(alone) + len(pooled), 2 * MOST_PAIRS)


def _on_everybodys_patients(pair: Pair, by: Headline) -> str:
    effect = change(pair, by.utility)
    if effect is None:
        return f"On everybody’s patients the two cannot be compared: {_gap(pair, by)}."
    return (
        f"On everybody’s patients {_PAYS[effect.sign]}. “{pair.changed.configuration}”, trained together, against the "
        f"mean of the models that each hospital trained alone: {effect.sentence}"
    )


def _on_own_patients(pair: Pair, by: Headline) -> str:
    """Returns what the common model is worth to a hospital that would otherwise use its own model at home."""
    names = [name for name in pair.base.clients if name not in WORST]
    metric = by.utility if _compared(pair, names, by.utility) == names else "accuracy"
    known = _compared(pair, names, metric)
    common, own = (averaged([row.client(name, metric) for name in known]) for row in (pair.changed, pair.base))
    effect = admitting(pair, side_by_side(common, own, metric))
    if effect is None:
        return "On each hospital’s own patients the two cannot be compared: no hospital has a number for both models."
    each = []
    for name in known[:MOST_HOSPITALS]:
        ours, theirs = pair.changed.client(name, metric), pair.base.client(name, metric)
        gap = difference(ours, theirs)
        if ours.value is not None and theirs.value is not None and gap is not None:
            values = f"{numbers.metric_value(metric, ours.value)} against {numbers.metric_value(metric, theirs.value)}"
            each.append(f"{name} {values}{_bounds(metric, gap.low, gap.high)}")
    more = f"; {len(known) - MOST_HOSPITALS} more stand in the table" if len(known) > MOST_HOSPITALS else ""
    part = f" (of {len(names)}; the others lack a number)" if len(known) < len(names) else ""
    return (
        f"On each hospital’s own patients {_PAYS[effect.sign]}. “{pair.changed.configuration}”, trained together, "
        f"against each hospital’s own model on test images of patients like its own, mean over {len(known)} "
        f"hospitals{part}: {effect.sentence} One by one: {'; '.join(each)}{more}."
    )


def _compared(pair: Pair, names: Sequence[str], metric: str) -> list[str]:
    """Returns the hospitals for which both sides have a value of the same seeds."""
    seeds = {name: [{s for s, _ in row.client(name, metric).by_seed} for row in pair[:2]] for name in names}
    return [name for name in names if set.intersection(*seeds[name])]


def _bounds(metric: str, low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" (difference {numbers.metric_bounds(metric, low, high)})"


def _gap(pair: Pair, by: Headline) -> str:
    absent = [row for row in pair[:2] if row.metric(by.utility).value is None]
    return "; ".join(f"“{row.configuration}” has no {numbers.metric_title(by.utility)}" for row in absent)


def _privacy(rows: Sequence[Row], by: Headline) -> list[Finding]:
    found = pairs(rows, ["privacy"], _with("privacy"), _without("privacy"))
    texts = []
    for pair in found[:MOST_PAIRS]:
        effect = change(pair, by.utility)
        if effect is not None:
            promise = pair.changed.promise or "no guarantee, for it is void"
            texts.append(f"{named(pair)} ({promise}): {effect.sentence}")
    return _finding("What does privacy cost?", texts, len(found), MOST_PAIRS)


def _defence(rows: Sequence[Row], by: Headline) -> list[Finding]:
    found = pairs(rows, ["defence"], _with("defence"), _without("defence"))
    texts = []
    for pair in found[:MOST_PAIRS]:
        cost = change(pair, by.utility)
        if cost is None:
            continue
        texts.append(f"{named(pair)}, on clean images: {cost.sentence}")
        texts += _under_attack(pair, by)
    return _finding("What does adversarial training cost and buy?", texts, len(found), MOST_PAIRS)


def _together(rows: Sequence[Row], by: Headline) -> list[Finding]:
    found = pairs(
        rows,
        ["privacy", "defence"],
        _with("privacy", "defence"),
        _without("privacy", "defence"),
    )
    texts = []
    for pair in found[:MOST_PAIRS]:
        cost = change(pair, by.utility)
        if cost is not None:
            texts.append(f"{named(pair)}, on clean images: {cost.sentence}")
        texts += _under_attack(pair, by)
    return _finding("What do both cost together?", texts, len(found), MOST_PAIRS)


def _fragility(rows: Sequence[Row], by: Headline) -> list[Finding]:
    if not by.evaluation:
        return []
    found = pairs(
        rows,
        ["privacy"],
        lambda row: _with("privacy")(row) and _without("defence")(row) and not row.constant,
        _without("privacy", "defence"),
    )
    texts = []
    for pair in found[:MOST_PAIRS]:
        at = _telling(pair, by)
        effect = side_by_side(_among_correct(pair.changed, at), _among_correct(pair.base, at), "robust_accuracy", _KEPT)
        if effect is None:
            texts += _unsaid(pair, by, "It cannot be told:")
            continue
        opening = {
            1: "No, the private model keeps more of its right answers",
            -1: "Yes, the private model loses more of its right answers",
            0: "It cannot be told",
        }
        texts.append(f"{opening[effect.sign]}. {named(pair)}, under {attack(at)}: {effect.sentence}")
    return _finding("Does privacy alone make it more fragile?", texts, len(found), MOST_PAIRS)


def _compression(rows: Sequence[Row]) -> list[Finding]:
    full = {row.configuration: row for row in rows if row.compression == UNCOMPRESSED}
    found = []
    for label in dict.fromkeys(row.compression for row in rows if row.compression != UNCOMPRESSED):
        same = [
            Pair(row, full[row.configuration], exact=True)
            for row in rows
            if row.compression == label and row.configuration in full
        ]
        texts = []
        smaller = _ratios(same, lambda row: row.file_bytes)
        if smaller:
            texts.append(f"{label} makes the file {smaller} times smaller.")
        faster = _ratios(same, lambda row: row.latency_1)
        if faster:
            texts.append(f"Fp32 needs {faster} times as long as {label} for one image.")
        texts.extend(_largest_change(same, "accuracy"))
        found.extend(_finding(f"What does {label} cost and save?", texts, 0, 0))
    return found


def _largest_change(same: Sequence[Pair], metric: str) -> list[str]:
    effects = [(pair, effect) for pair in same if (effect := change(pair, metric)) is not None]
    if not effects:
        return []
    values = [effect.difference.value for _, effect in effects]
    pair, worst = min(effects, key=lambda item: item[1].difference.value)
    if len(effects) == 1:
        return [f"In accuracy, {worst.sentence}"]
    span = numbers.metric_bounds(metric, min(values), max(values))
    return [
        f"Over {len(effects)} configurations the accuracy changes by {span} points; "
        f"at worst, for “{pair.changed.configuration}”, {worst.sentence}"
    ]


def _threat(rows: Sequence[Row], by: Headline) -> list[Finding]:
    found = pairs(rows, ["threat"], _with("threat"), _without("threat"))
    texts = []
    for pair in found[:MOST_PAIRS]:
        effect = change(pair, by.utility)
        if effect is not None:
            texts.append(f"{named(pair)}, on clean images: {effect.sentence}")
        texts += _under_attack(pair, by, yardstick=False)
    planted = backdoor_sentences(rows)
    texts += planted[:MOST_PAIRS]
    return _finding("What does the threat do?", texts, len(found), MOST_PAIRS)


def _with(*fields: str) -> Callable[[Row], bool]:
    return lambda row: all(row.kind(field) != "none" for field in fields)


def _without(*fields: str) -> Callable[[Row], bool]:
    return lambda row: all(row.kind(field) == "none" for field in fields)


def _finding(topic: str, texts: Sequence[str], num_found: int, most: int) -> list[Finding]:
    if not texts:
        return []
    more = [f"{num_found - most} more comparisons of this kind stand in the table."] if num_found > most else []
    return [Finding(topic, (*texts, *more))]


def _telling(pair: Pair, by: Headline) -> Headline:
    """Returns the radius that tells most: where the base keeps closest to half of its right answers."""
    radii = [a.radius for a in pair.base.attacked if a.evaluation == by.evaluation]
    kept = {radius: pair.base.under(by.evaluation, radius).among_correct.value for radius in radii}
    known = {radius: value for radius, value in kept.items() if value is not None}
    return by._replace(radius=min(known, key=lambda radius: abs(known[radius] - 0.5))) if known else by


def _robust(row: Row, by: Headline) -> Estimate:
    return row.under(by.evaluation, by.radius).robust


def _among_correct(row: Row, by: Headline) -> Estimate:
    return row.under(by.evaluation, by.radius).among_correct


def _under_attack(pair: Pair, by: Headline, *, yardstick: bool = True) -> list[str]:
    """Returns what a pair's difference does under attack, or that its numbers are withheld; nothing without any."""
    effect = side_by_side(_robust(pair.changed, by), _robust(pair.base, by), "robust_accuracy")
    if effect is None:
        return _unsaid(pair, by, "Under attack nothing can be said:")
    against = _against_majority(pair, by) if yardstick else ""
    return [f"Under {attack(by)}: {effect.sentence} {against}".rstrip()]


def _unsaid(pair: Pair, by: Headline, opening: str) -> list[str]:
    """Returns whose robust accuracy is withheld, so that a pair cannot be compared; nothing where neither's is."""
    withheld = [f"“{row.configuration}”" for row in pair[:2] if _robust(row, by).withheld]
    return [f"{opening} the robust accuracy of {' and of '.join(withheld)} is withheld."] if withheld else []


def _against_majority(pair: Pair, by: Headline) -> str:
    value, majority = _robust(pair.changed, by).judged, pair.changed.majority
    if value is None or majority is None:
        return ""
    share = numbers.percent(majority)
    if value <= majority:
        return f"That is no more than always giving the most frequent answer ({share}), so it is not robust."
    return f"Always giving the most frequent answer reaches {share}."


def _ratios(same: Sequence[Pair], read: Callable[[Row], Estimate]) -> str:
    """Returns by how much the uncompressed side is larger, as "3.6" or "3.6 to 3.7"."""
    ratios = []
    for pair in same:
        small, large = read(pair.changed).value, read(pair.base).value
        if small and large:
            ratios.append(large / small)
    if not ratios:
        return ""
    low, high = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
    return low if low == high else f"{low} to {high}"
