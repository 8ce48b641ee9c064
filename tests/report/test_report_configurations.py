from dataclasses import replace

import pytest
from builder import BOTH, CONSTANT, DP, HOSPITALS, MADE, MAJORITY, PGD, PLAIN, SEEDS, Made, build, pick, rate

from trilemma.privacy.guarantee import Guarantee
from trilemma.report.configurations import configuration_rows, counterpart, headline
from trilemma.report.transfer import transfer_matrices


def rows_by_title(results):
    return {row.title: row for row in configuration_rows(results)}


def test_one_row_per_configuration_and_compression_in_the_studys_order():
    rows = configuration_rows(build())
    assert [row.title for row in rows] == [f"{label}, {how}" for label in MADE for how in ("fp32", "int8")]
    assert all(row.seeds == SEEDS for row in rows)


def test_values_are_the_mean_over_seeds_of_what_was_measured():
    results = build()
    for row in configuration_rows(results):
        keys = {artefact.key for artefact in pick(results, row.configuration, row.compression)}
        for metric in ("accuracy", "auroc", "sensitivity"):
            values = [
                m.value
                for e in results.evaluated
                if e.artefact_key in keys and e.kind == "clean"
                for m in e.measurements
                if m.metric == metric and m.client is None and m.value is not None
            ]
            assert row.metric(metric).value == pytest.approx(sum(values) / len(values))


def test_hospitals_that_trained_alone_share_a_row_and_are_judged_on_their_own():
    results = build()
    row = rows_by_title(results)["local only, fp32"]
    assert row.num_trainings == len(SEEDS) * len(HOSPITALS)
    own = []
    for index, name in enumerate(HOSPITALS):
        alone = {
            run.key
            for run in results.runs
            if run.configuration == "local only" and run.spec["algorithm"]["client"] == index
        }
        values = [
            m.value
            for e in results.evaluated
            if e.kind == "clean" and e.artefact_key.removesuffix("/fp32") in alone
            for m in e.measurements
            if m.client == name and m.metric == "accuracy"
        ]
        assert len(values) == len(SEEDS)
        assert row.client(name, "accuracy").value == pytest.approx(sum(values) / len(values))
        own.append(row.client(name, "accuracy").value)
    assert row.client("worst", "accuracy").value == min(own)


def test_epsilon_is_the_largest_and_void_if_any_artefact_is_void():
    results = build()
    assert rows_by_title(results)[f"{DP}, int8"].epsilon == 7.96
    broken = pick(results, DP, "int8")[1]
    artefacts = tuple(
        replace(a, guarantee=a.guarantee.voided("calibrated on training images")) if a is broken else a
        for a in results.artefacts
    )
    rows = rows_by_title(replace(results, artefacts=artefacts))
    assert rows[f"{DP}, int8"].epsilon is None
    assert (rows[f"{DP}, int8"].claim, rows[f"{DP}, int8"].promise) == (None, "")
    assert rows[f"{DP}, int8"].void == ("calibrated on training images",)
    assert rows[f"{DP}, fp32"].epsilon == 7.96
    assert rows[f"{DP}, fp32"].claim == ("example", 1e-4, "local", 0, True)


def test_a_guarantee_that_accounted_for_nothing_is_none():
    results = build()
    artefacts = tuple(replace(a, guarantee=Guarantee()) for a in results.artefacts)
    row = configuration_rows(replace(results, artefacts=artefacts))[0]
    assert row.epsilon is None
    assert row.void == ("no step was accounted for",)


def test_constant_predictors_are_found():
    rows = rows_by_title(build())
    assert set(rows[f"{CONSTANT}, fp32"].constant) == {"answers “pneumonia” for everything"}
    assert not any(row.constant for row in rows.values() if row.configuration != CONSTANT)


def test_a_constant_of_three_classes_is_found():
    results = build()
    facts = (replace(results.data[0], classes=("a", "b", "c"), positive_class=""),)
    third = [
        rate("sensitivity", 1 / 3),
        rate("specificity", 2 / 3),
        rate("accuracy", 0.4),
        rate("majority_accuracy", 0.4),
    ]
    evaluated = tuple(replace(e, measurements=tuple(third)) if e.kind == "clean" else e for e in results.evaluated)
    rows = configuration_rows(replace(results, data=facts, evaluated=evaluated))
    assert set(rows[0].constant) == {"answers the most frequent class for everything"}


def test_what_was_not_attacked_is_missing_with_its_reason():
    results = build()
    row = rows_by_title(results)["label flip, int8"]
    assert row.under("PGD-20 Linf", 8 / 255).robust.by_seed[0][0] == 0
    assert len(row.under("PGD-20 Linf", 8 / 255).robust.by_seed) == 1
    assert row.under("never", 0.1).robust.value is None
    assert row.under("never", 0.1).robust.reason == "not measured"
    assert "the test split holds one class only" in rows_by_title(results)[f"{BOTH}, int8"].metric("auroc").reason


def test_headline_is_the_strongest_attack_at_the_largest_common_radius():
    results = build()
    assert headline(configuration_rows(results)) == ("auroc", "all at once Linf", 8 / 255)
    weaker = replace(results, evaluated=tuple(e for e in results.evaluated if e.kind != "all_at_once"))
    assert headline(configuration_rows(weaker)).evaluation == "PGD-20 Linf"
    clean = replace(results, evaluated=tuple(e for e in results.evaluated if e.kind == "clean"))
    assert headline(configuration_rows(clean)).evaluation == ""


def test_headline_takes_the_largest_radius_that_all_share():
    results = build()
    first = pick(results, PLAIN, "fp32")

    def cut(e):
        if e.artefact_key not in {a.key for a in first} or e.kind != "all_at_once":
            return e
        return replace(e, measurements=tuple(m for m in e.measurements if m.radius < 8 / 255))

    assert (
        headline(configuration_rows(replace(results, evaluated=tuple(map(cut, results.evaluated))))).radius == 4 / 255
    )


def test_a_counterpart_differs_in_one_thing_only():
    rows = configuration_rows(build())
    both = next(row for row in rows if row.title == f"{BOTH}, fp32")
    found, exact = counterpart(both, rows, ["privacy"], lambda row: row.kind("privacy") == "none")
    assert (found.title, exact) == (f"{PGD}, fp32", True)
    found, _ = counterpart(both, rows, ["threat"], lambda row: row.kind("threat") != "none")
    assert found is None


def test_a_counterpart_that_was_tuned_otherwise_is_said_to_be():
    results = build()
    runs = tuple(
        replace(run, spec={**run.spec, "rounds": 30}) if run.configuration == DP else run for run in results.runs
    )
    rows = configuration_rows(replace(results, runs=runs))
    dp = next(row for row in rows if row.title == f"{DP}, fp32")
    found, exact = counterpart(dp, rows, ["privacy"], lambda row: row.kind("privacy") == "none")
    assert (found.title, exact) == (f"{PLAIN}, fp32", False)


def test_empty_results_have_no_rows():
    assert configuration_rows(build(runs=(), artefacts=(), evaluated=())) == ()


def test_transfer_averages_over_seeds_and_leaves_the_diagonal_to_other_seeds():
    results = build({PLAIN: MADE[PLAIN], PGD: MADE[PGD]})
    (matrix,) = transfer_matrices(results)
    assert matrix.sources == matrix.targets
    titles = {
        a.key: f"{label}, {a.compression}"
        for label in (PLAIN, PGD)
        for how in ("fp32", "int8")
        for a in pick(results, label, how)
    }
    values = [
        m.value
        for e in results.evaluated
        if e.kind == "transfer" and titles[e.artefact_key] == f"{PGD}, int8"
        for m in e.measurements
        if m.source and titles[m.source] == f"{PLAIN}, fp32" and m.metric == "robust_accuracy"
    ]
    row, column = matrix.sources.index(f"{PLAIN}, fp32"), matrix.targets.index(f"{PGD}, int8")
    assert matrix.values[row][column] == pytest.approx(sum(values) / len(values))


def test_transfer_between_files_of_one_training_is_marked():
    results = build({PLAIN: MADE[PLAIN], "local only": MADE["local only"]})
    (matrix,) = transfer_matrices(results)
    for source, marks in zip(matrix.sources, matrix.same_training, strict=True):
        for target, marked in zip(matrix.targets, marks, strict=True):
            (label, how), (its_label, its_how) = source.rsplit(", ", 1), target.rsplit(", ", 1)
            assert marked == (label == its_label and how != its_how), (source, target)


def test_a_model_at_the_majority_class_is_measured_as_such():
    row = rows_by_title(build({CONSTANT: Made(0.5, MAJORITY, (MAJORITY,) * 3, epsilon=1.0)}))[f"{CONSTANT}, fp32"]
    assert row.majority == MAJORITY
    assert row.metric("accuracy").value == MAJORITY
