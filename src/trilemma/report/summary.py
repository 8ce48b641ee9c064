"""The table of configurations as plain values, for the terminal and for every export."""

from collections.abc import Sequence
from typing import Any

from trilemma.report import numbers
from trilemma.report.configurations import Headline, Row, claims_of, configuration_rows, headline
from trilemma.report.datasets import data_of
from trilemma.report.estimates import Estimate
from trilemma.report.flags import why_withheld
from trilemma.report.pareto import pareto_rows
from trilemma.results import Results

_RATES = ("accuracy", "balanced_accuracy", "auroc", "mcc", "sensitivity", "specificity", "expected_calibration_error")


def summary_rows(results: Results) -> list[dict[str, Any]]:
    """Returns one dict per configuration and compression; what is missing is None, never 0.

    Every rate has three entries: its name, `NAME_low` and `NAME_high`. `robust_evaluation` and `robust_radius` say
    under which attack `robust_accuracy` was measured, `robust_auroc_evaluation` which one measured `robust_auroc`;
    `flags` are the signs that the robustness is not there, and `robust_withheld_because` why a number is withheld;
    `robust_bound_because` says why one is known to be too high, and `robust_accuracy_known` the least that is left.
    `privacy_unit`, `delta` and `trust` say what `epsilon` is about, `positive_class` whose images
    `sensitivity` is about (None for more than two classes: it is a macro average).
    """
    rows = configuration_rows(results)
    by = headline(rows)
    positive = {run.configuration: data_of(run, results).positive_class or None for run in results.runs}
    return [
        _plain(row, best, by) | {"positive_class": positive[row.configuration]}
        for row, best in zip(rows, pareto_rows(rows, by), strict=True)
    ]


def written_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Returns column titles and cells as a reader sees them, for tables of text."""
    rows = configuration_rows(results)
    by = headline(rows)
    utilities = ("auroc", "accuracy") if any(row.metric("auroc").value is not None for row in rows) else ("accuracy",)
    robust = [f"robust ({by.evaluation}, {numbers.radius(by.radius)})"] if by.evaluation else []
    titles = ["configuration", "compression", *map(numbers.metric_title, utilities), "epsilon", *robust]
    planted = list(dict.fromkeys(name for row in rows for name in row.triggered))
    titles += [f"attack success ({name})" for name in planted]
    titles += ["file", "latency", "Pareto"]
    mixed = len(claims_of(rows)) > 1
    cells = [
        _written(row, best, by, utilities, mixed, planted)
        for row, best in zip(rows, pareto_rows(rows, by), strict=True)
    ]
    return titles, cells


def legend(results: Results) -> list[str]:
    """Returns what a reader of `written_rows` must know: its signs, the majority class, what epsilon is about."""
    rows = configuration_rows(results)
    said = ["★ Pareto-optimal, ↓ at or below the majority class, – not measured."]
    said += _about_withheld(rows)
    by = headline(rows)
    if any(row.under(by.evaluation, by.radius).robust.bound for row in rows):
        said.append("≤ an upper bound: something else that was tried leaves less.")
    shares = majority_shares(rows)
    if shares:
        said.append(f"Majority class: {shares} of the test images.")
    claims = claims_of(rows)
    if len(claims) == 1:
        said.append(f"Epsilon is for {claims[0].in_words}.")
    elif claims:
        said.append("Epsilons are compared only where unit, δ and noise are the same.")
    return said


def _about_withheld(rows: Sequence[Row]) -> list[str]:
    """Returns which robust accuracies of the table are withheld and by which flags, in one line, or nothing."""
    by = headline(rows)
    found: dict[str, list[str]] = {}
    for row in rows:
        robust = row.under(by.evaluation, by.radius).robust
        if robust.withheld:
            found.setdefault(why_withheld(robust, row.diagnosed), []).append(f"“{row.title}”")
    if not found:
        return []
    each = "; ".join(f"{', '.join(titles)} ({why})" for why, titles in found.items())
    return [f"Withheld, for there are signs that the robustness is not there: {each}."]


def majority_shares(rows: Sequence[Row]) -> str:
    """Returns the accuracy of always giving the most frequent answer, "62.5 %" or "50.0 % to 62.5 %", or ""."""
    written = [numbers.percent(share) for share in sorted(row.majority for row in rows if row.majority is not None)]
    return " to ".join(dict.fromkeys((written[0], written[-1]))) if written else ""


def _plain(row: Row, best: bool, by: Headline) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "configuration": row.configuration,
        "compression": row.compression,
        "seeds": list(row.seeds),
        "num_trainings": row.num_trainings,
    }
    for metric in _RATES:
        plain |= _three(metric, row.metric(metric))
    plain |= _three("worst_client_accuracy", row.client("worst", "accuracy"))
    plain |= {
        "majority_accuracy": row.majority,
        "epsilon": row.epsilon,
        "delta": row.claim.delta if row.claim else None,
        "privacy_unit": row.claim.unit if row.claim else None,
        "trust": row.claim.trust if row.claim else None,
        "seeded_noise": row.claim.seeded if row.claim else None,
        "no_guarantee_because": "; ".join(row.void),
        "robust_evaluation": by.evaluation or None,
        "robust_radius": by.radius if by.evaluation else None,
    }
    at = row.under(by.evaluation, by.radius)
    score = row.scored(by.evaluation, by.radius)
    plain |= _three("robust_accuracy", at.robust)
    plain |= _three("robust_accuracy_among_correct", at.among_correct)
    plain |= _three("robust_auroc", score.estimate)
    plain |= _three("robust_sensitivity", at.sensitivity)
    plain |= _three("robust_specificity", at.specificity)
    for name, each in row.triggered.items():
        for metric, found in each.items():
            plain |= _three(f"{metric} ({name})", found)
    return plain | {
        "robust_auroc_evaluation": score.evaluation or None,
        "robust_bound_because": at.robust.reason if at.robust.bound else "",
        "robust_accuracy_known": at.robust.least,
        "robust_withheld_because": at.robust.reason if at.robust.withheld else "",
        "flags": list(row.flags),
        "file_bytes": row.file_bytes.value,
        "multiply_adds": row.multiply_adds.value,
        "latency_batch1_seconds": row.latency_1.value,
        "latency_batch32_seconds": row.latency_32.value,
        **_sent(row),
        "training_seconds": row.training_seconds.value,
        "constant": bool(row.constant),
        "pareto_optimal": best,
    }


def _sent(row: Row) -> dict[str, float | None]:
    """Returns what crossed the network."""
    return {
        "bytes_per_round": row.bytes_per_round.value,
        "bytes_up_by_client_mean": row.traffic.up.mean.value,
        "bytes_up_by_client_largest": row.traffic.up.largest.value,
        "bytes_down_by_client_mean": row.traffic.down.mean.value,
        "bytes_down_by_client_largest": row.traffic.down.largest.value,
        "bytes_in_all": row.traffic.total.value,
    }


def _three(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _written(
    row: Row, best: bool, by: Headline, utilities: tuple[str, ...], mixed: bool, planted: Sequence[str]
) -> list[str]:
    robust = row.under(by.evaluation, by.radius).robust
    below = robust.judged is not None and row.majority is not None and robust.judged <= row.majority
    size, latency = row.file_bytes.value, row.latency_1.value
    about = f" ({row.claim.in_words})" if mixed and row.claim else ""
    return [
        row.configuration,
        row.compression,
        *(numbers.metric_estimate(metric, row.metric(metric)) for metric in utilities),
        "no guarantee" if row.epsilon is None else numbers.epsilon(row.epsilon) + about,
        *([numbers.metric_estimate("robust_accuracy", robust) + (" ↓" if below else "")] if by.evaluation else []),
        *(numbers.metric_estimate("accuracy", row.backdoor(name, "attack_success_rate")) for name in planted),
        numbers.NO_VALUE if size is None else numbers.byte_size(size),
        numbers.NO_VALUE if latency is None else numbers.duration(latency),
        "★" if best else "",
    ]
