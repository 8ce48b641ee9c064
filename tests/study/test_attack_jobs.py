"""What an attack of a study is given, on which images it is judged, and which numbers follow from it."""

import csv
import json
import os
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from helpers.pictures import write_stripes
from helpers.tiny_study import SMALLEST, plan_of, run_plan, write_study
from trilemma.attacks.evasion import specs as evasion_specs
from trilemma.attacks.evasion.fgsm import fgsm
from trilemma.attacks.evasion.mifgsm import mifgsm
from trilemma.attacks.evasion.specs import SCORED_STEPS, Apgd, AutoAttack, Fab, Fgsm, MiFgsm, Pgd, Square
from trilemma.attacks.evasion.types import Access
from trilemma.evaluation.harness import attack_images, attacked_logits
from trilemma.evaluation.metrics import predictions
from trilemma.evaluation.robustness import robust_auroc
from trilemma.evaluation.specs import Clean, Transfer
from trilemma.report.configurations import configuration_rows
from trilemma.report.export import export_csv, export_json
from trilemma.report.html import report_html
from trilemma.study import evaluate_job
from trilemma.study.assemble import assemble
from trilemma.study.combine import combined_key, part_keys
from trilemma.study.engine import attacks_to_make
from trilemma.study.evaluate_job import AttackTask, attack_job, open_target
from trilemma.study.keys import evaluation_key
from trilemma.study.store import Store
from trilemma.study.workplace import Workplace

#: Two trainings that learn something, each as float and as int8.
STUDY = """
name = "attacked"
question = "What is an attack given?"
base.data = { kind = "folder", path = "FOLDER", size = 16 }
base.partition = { kind = "iid", num_clients = 2 }
base.model = { kind = "resnet9", width = 4 }
base.local = { batch_size = 8, optimizer = "adam", learning_rate = 0.003 }
base.rounds = 4
grid.defence = [{ kind = "none" }, { kind = "fgsm", radius = "1/255" }]
[[compressions]]
kind = "none"
[[compressions]]
kind = "int8"
calibration = "train"
num_calibration = 16
"""
RADIUS = 6 / 255


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = write_stripes(tmp_path_factory.mktemp("images"), 96, 40)
    return STUDY.replace("FOLDER", str(folder))


@pytest.fixture(scope="module")
def plan(tmp_path_factory, text):
    return plan_of(write_study(tmp_path_factory.mktemp("study"), text))


@pytest.fixture(scope="module")
def place(plan, roots, tmp_path_factory):
    """A store that holds the models and their clean metrics; jobs write nothing to it."""
    folder = tmp_path_factory.mktemp("attacked")
    run_plan(plan, folder, roots)
    return Workplace(folder, roots, "cpu", 1, os.getpid())


@pytest.fixture(scope="module")
def clean(plan, place):
    """Artefact key -> stored logits on clean images."""
    with Store(place.folder) as store:
        return {c.key: store.outcomes(evaluation_key(c.key, Clean()))[0].logits_NK for c in plan.cells}


@pytest.fixture(scope="module")
def test_split(plan, roots):
    return plan.trainings[0].spec.data.load(roots).test


def white_box(place, cell, spec, clean):
    (row,) = attack_job(place, AttackTask(spec, cell, True, None, (), clean))
    return row


def value(row, metric, radius=RADIUS):
    (found,) = (m for m in row.measurements if m.metric == metric and m.radius == radius)
    return found.value


def test_a_compressed_artefact_is_attacked_as_it_ships_with_the_model_it_came_from(
    plan, place, clean, test_split, monkeypatch
):
    """AutoAttack asks the session, follows the twin, and tries the images of the fp32 parent; a float one has none."""
    seen = []

    def watched(classifier, x_BCHW, y_B, budget, generator, **given):
        seen.append((classifier, given))
        return x_BCHW

    monkeypatch.setattr(evasion_specs, "autoattack", watched)
    x_NCHW = test_split.x()
    for parent, child in (plan.cells[:2], plan.cells[2:]):
        assert (parent.compression.kind, child.compression.kind) == ("none", "int8")
        for cell, num_surrogates in ((parent, 0), (child, 1)):
            seen.clear()
            white_box(place, cell, AutoAttack(radii=(RADIUS,)), clean)
            assert seen
            for _, given in seen:
                assert set(given) == {"effort", "answers", "surrogates"} and len(given["surrogates"]) == num_surrogates
            classifier, given = seen[-1]
            asked_NK, twin_NK = given["answers"](x_NCHW).numpy(), classifier(x_NCHW).detach().numpy()
            np.testing.assert_allclose(asked_NK, clean[cell.key], atol=1e-5)
            assert not isinstance(given["answers"], torch.nn.Module)  # the session on the file, not a network
            assert np.abs(twin_NK - clean[cell.key]).max() < 0.1 * np.abs(clean[cell.key]).max()
        (surrogate,) = given["surrogates"]
        np.testing.assert_allclose(surrogate(x_NCHW).detach().numpy(), clean[parent.key], atol=1e-4)
        assert np.abs(clean[parent.key] - clean[child.key]).max() > 1e-3  # so that the one is not the other


def test_what_a_target_is_made_of(plan, place):
    for cell in plan.cells:
        target = open_target(place, cell)
        assert (len(target.surrogates) == 1) == (cell.compression.kind == "int8") and target.key == cell.key
        assert target.access.answers == target.predict and target.access.surrogates == target.surrogates


@pytest.mark.parametrize(
    ("spec", "scored"),
    [
        (Pgd(radii=(RADIUS,), steps=3, loss="margin"), True),
        (AutoAttack(radii=(RADIUS,)), True),
        (Pgd(radii=(RADIUS,), steps=3), False),
        (Fgsm(radii=(RADIUS,)), False),
        (MiFgsm(radii=(RADIUS,), steps=2), False),
        (Apgd(radii=(RADIUS,), steps=3, loss="margin"), True),
        (Apgd(radii=(RADIUS,), steps=3), False),
        (Fab(radii=(RADIUS,), steps=2), False),
        (Square(radii=(RADIUS,), queries=5), False),
    ],
    ids=lambda spec: getattr(spec, "label", ""),
)
def test_which_attacks_give_an_auroc(plan, place, clean, monkeypatch, spec, scored):
    monkeypatch.setattr(evasion_specs, "autoattack", lambda classifier, x_BCHW, *_, **__: x_BCHW)
    row = white_box(place, plan.cells[0], spec, clean)
    assert [m.radius for m in row.measurements if m.metric == "robust_auroc"] == [RADIUS] * scored


@pytest.mark.parametrize("number", [0, 1], ids=["float", "int8"])
def test_an_auroc_under_attack_is_of_images_that_were_driven_to_the_end(plan, place, clean, test_split, number):
    """Computed again: of full-budget images, which rank worse than those that stopped as soon as they were broken."""
    cell, spec = plan.cells[number], Pgd(radii=(RADIUS,), steps=10, loss="margin")
    row, source = white_box(place, cell, spec, clean), open_target(place, cell)
    logits = {}
    for stop in (False, True):
        evasion = spec.make(source.access, stop=stop)
        (logits[stop],) = attacked_logits(source.twin, [source], evasion, spec.budgets[0], test_split, 0)
    full, stopped = (robust_auroc(logits[s], test_split.labels_N, test_split.units(), RADIUS, 0) for s in (False, True))
    (stored,) = (m for m in row.measurements if m.metric == "robust_auroc")
    assert stored[1:5] == full[1:5] and full.value < stopped.value
    if number == 0:  # the int8 file is attacked from its parent, too
        assert np.array_equal(row.outcomes[0].logits_NK, logits[False])
    # Which images break does not depend on it.
    assert np.array_equal(*(predictions(logits[s]) == test_split.labels_N for s in (False, True)))


def test_the_attack_that_gives_the_auroc_counts_in_robust_accuracy_too(plan, place, clean, test_split, monkeypatch):
    """An ensemble that breaks nothing at all: what its companion breaks is broken."""
    monkeypatch.setattr(evasion_specs, "autoattack", lambda classifier, x_BCHW, *_, **__: x_BCHW.clone())
    cell, labels_N = plan.cells[0], test_split.labels_N
    row = white_box(place, cell, AutoAttack(radii=(RADIUS,)), clean)
    alone = white_box(place, cell, Apgd(radii=(RADIUS,), steps=SCORED_STEPS, loss="margin"), clean)
    accuracy = (predictions(clean[cell.key]) == labels_N).mean()
    assert value(row, "robust_accuracy") == value(alone, "robust_accuracy") < accuracy
    assert value(row, "robust_auroc") == value(alone, "robust_auroc")
    right_N = predictions(row.outcomes[0].logits_NK) == labels_N  # also in the stored logits, for what is combined
    assert right_N.mean() <= value(row, "robust_accuracy") + 1e-9


def test_what_the_ensemble_breaks_and_its_companion_does_not_is_broken(plan, place, clean, test_split, monkeypatch):
    """The other way round: an ensemble that breaks everything, beside a PGD that breaks nothing."""
    cell, wrong_NK = plan.cells[0], np.eye(2, dtype=np.float32)[1 - test_split.labels_N]
    monkeypatch.setattr(evasion_specs, "autoattack", lambda classifier, x_BCHW, *_, **__: x_BCHW)
    monkeypatch.setattr(
        evaluate_job,
        "attacked_logits",
        lambda twin, targets, evasion, *_: [wrong_NK if "surrogates" in evasion.keywords else clean[cell.key]],
    )
    row = white_box(place, cell, AutoAttack(radii=(RADIUS,)), clean)
    assert value(row, "robust_accuracy") == 0 and value(row, "robust_auroc") == 1


@pytest.mark.parametrize(
    "spec", [Pgd(radii=(RADIUS,), steps=4), Fgsm(radii=(RADIUS,)), Apgd(radii=(RADIUS,), loss="margin", steps=4)]
)
def test_a_compressed_file_is_attacked_through_its_twin_and_from_its_parent(plan, place, clean, test_split, spec):
    """Image by image the worst; computed again."""
    parent, child = plan.cells[:2]
    source, labels_N = open_target(place, child), test_split.labels_N
    evasion = spec.make(source.access, stop=False)
    through = attacked_logits(source.twin, [source], evasion, spec.budgets[0], test_split, 0)[0]
    evasion = spec.make(Access(source.predict))
    across = attacked_logits(source.surrogates[0], [source], evasion, spec.budgets[0], test_split, 0)[0]
    right = [predictions(logits) == labels_N for logits in (clean[child.key], through, across)]
    row = white_box(place, child, spec, clean)
    assert value(row, "robust_accuracy") == pytest.approx(np.all(right, axis=0).mean())
    assert white_box(place, parent, spec, clean).outcomes[0].logits_NK.shape == through.shape


def test_what_only_the_parents_images_break_is_broken(plan, place, clean, test_split, monkeypatch):
    """A twin whose gradients lead nowhere: the file withstands nothing for that."""
    child, labels_N = plan.cells[1], test_split.labels_N
    wrong_NK = np.eye(2, dtype=np.float32)[1 - labels_N]

    def planted(model, targets, *_):
        return [clean[child.key] if model is targets[0].twin else wrong_NK]

    monkeypatch.setattr(evaluate_job, "attacked_logits", planted)
    assert value(white_box(place, child, Pgd(radii=(RADIUS,), steps=2), clean), "robust_accuracy") == 0


def test_an_attack_that_also_transfers_is_made_once_and_to_the_end(plan, place, clean, test_split, monkeypatch):
    made = []

    def watched(twin, targets, evasion, budget, *arguments):
        made.append((budget.radius, evasion.keywords["stop"], len(targets)))
        return attacked_logits(twin, targets, evasion, budget, *arguments)

    spec = Pgd(radii=("3/255", "6/255"), steps=3)
    both = replace(plan, evaluations=(spec, Transfer(attack=spec)))
    first, *others = attacks_to_make(both, set(), set(clean))
    assert first.white_box and len(first.targets) == 3 and len(others) == 3
    monkeypatch.setattr(evaluate_job, "attacked_logits", watched)
    rows = attack_job(place, replace(first, clean=clean))
    assert made == [(3 / 255, False, 4), (6 / 255, False, 4)]
    assert [row.key for row in rows] == [
        evaluation_key(first.source.key, spec),
        *(evaluation_key(cell.key, Transfer(attack=spec), (first.source.key,)) for cell in first.targets),
    ]
    source = open_target(place, first.source)
    images = attack_images(source.twin, spec.make(source.access, stop=False), spec.budgets[1], test_split, 0)
    for row, cell in zip(rows, (first.source, *first.targets), strict=True):
        expected_NK = open_target(place, cell).predict(images).numpy()
        np.testing.assert_allclose(row.outcomes[1].logits_NK, expected_NK, atol=1e-4)
    made.clear()
    (alone,) = attacks_to_make(replace(plan, evaluations=(spec,)), set(), {first.source.key})
    attack_job(place, replace(alone, clean=clean))
    assert made == [(3 / 255, True, 1), (6 / 255, True, 1)]  # nobody else needs its images: broken ones leave


def test_what_is_left_to_do_of_a_shared_attack_is_done_alone(plan):
    spec, ready = Pgd(radii=(RADIUS,), steps=3), {cell.key for cell in plan.cells}
    transfer = Transfer(attack=spec)
    both = replace(plan, evaluations=(spec, transfer))
    source, *targets = plan.cells
    done = {evaluation_key(source.key, spec)}
    assert attacks_to_make(both, done, ready)[0] == AttackTask(spec, source, False, transfer, tuple(targets), {})
    done = {evaluation_key(cell.key, transfer, (source.key,)) for cell in targets}
    assert attacks_to_make(both, done, ready)[0] == AttackTask(spec, source, True, transfer, (), {})
    # Another attack of the same kind is another one.
    other = replace(plan, evaluations=(spec, Transfer(attack=MiFgsm(radii=(RADIUS,)))))
    assert [(a.spec.kind, a.white_box, len(a.targets)) for a in attacks_to_make(other, set(), ready)[:2]] == [
        ("pgd", True, 0), ("mifgsm", False, 3),
    ]  # fmt: skip


def test_mifgsm_transfers(plan, roots, place, text, test_split, tmp_path):
    """From the file to the store: every pair, and the worst over the other training's artefacts."""
    attack = f'{{ kind = "mifgsm", radius = {RADIUS}, steps = 4, decay = 0.5 }}'
    full = plan_of(write_study(tmp_path, f'{text}\n[[evaluations]]\nkind = "transfer"\nattack = {attack}\n'))
    transfer, label = full.evaluations[0], "transfer MI-FGSM-4 decay 0.5 Linf"
    assert [c.key for c in full.cells] == [c.key for c in plan.cells] and isinstance(transfer, Transfer)
    folder = shutil.copytree(place.folder, tmp_path / "store")
    run_plan(replace(full, evaluations=(transfer,)), folder, roots)
    target, source = plan.cells[0], open_target(place, plan.cells[2])
    with Store(folder) as store:
        pairs = [store.evaluation(key) for key in part_keys(full, target, transfer)]
        worst = store.evaluation(combined_key(full, target, transfer))
        (outcome,) = store.outcomes(pairs[0].key)
    assert {row.spec["label"] for row in (*pairs, worst)} == {label}
    assert [{m.source for m in row.measurements} for row in pairs] == [{plan.cells[2].key}, {plan.cells[3].key}]
    evasion = partial(mifgsm, steps=4, decay=0.5, answers=source.predict, stop=False)
    targets, (budget,) = [open_target(place, target)], transfer.budgets
    (expected_NK,) = attacked_logits(source.twin, targets, evasion, budget, test_split, 0)
    np.testing.assert_allclose(outcome.logits_NK, expected_NK, atol=1e-5)
    assert np.abs(expected_NK - clean_of(place, target)).max() > 0.01
    assert value(worst, "robust_accuracy") <= min(value(pair, "robust_accuracy") for pair in pairs)
    assert not [m for row in (*pairs, worst) for m in row.measurements if m.metric == "robust_auroc"]


def clean_of(place, cell):
    with Store(place.folder) as store:
        return store.outcomes(evaluation_key(cell.key, Clean()))[0].logits_NK


@pytest.mark.parametrize(("classes", "variant"), [(2, "binary variant"), (3, "3-class variant")])
def test_a_result_of_autoattack_is_called_by_its_variant(roots, tmp_path, classes, variant, monkeypatch):
    """In the store, in what a report reads, in the report and in the exports: the two are not comparable."""
    monkeypatch.setattr(evasion_specs, "autoattack", lambda *given, **__: fgsm(*given))  # it is the name that counts
    attack = f'\n[[evaluations]]\nkind = "autoattack"\neffort = "quick"\nradius = {RADIUS}\n'
    plan = plan_of(write_study(tmp_path, SMALLEST.replace("classes = 2", f"classes = {classes}") + attack))
    spec, label = plan.evaluations[0], f"quick AutoAttack {variant} Linf"
    run_plan(replace(plan, evaluations=(spec,)), tmp_path / "store", roots)
    with Store(tmp_path / "store") as store:
        row = store.evaluation(evaluation_key(plan.cells[0].key, spec))
        results = assemble(plan, store, "", "")
    assert row.spec["label"] == label and row.spec["effort"] == "quick"
    assert [e.evaluation for e in results.evaluated] == [label]
    assert results.examples and all(example.title.startswith(f"{label}, ") for example in results.examples)
    (configuration,) = configuration_rows(results)
    assert {a.evaluation for a in configuration.attacked} == {label}
    shown = report_html(results)
    assert label in shown and "quick AutoAttack Linf" not in shown
    export_csv(results, tmp_path / "out.csv")
    export_json(results, tmp_path / "out.json")
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        named = {line["evaluation"] for line in csv.DictReader(file) if line["metric"] == "robust_accuracy"}
    exported = json.loads((tmp_path / "out.json").read_text("utf-8"))["measurements"]
    assert named == {line["evaluation"] for line in exported if line["metric"] == "robust_accuracy"} == {label}
