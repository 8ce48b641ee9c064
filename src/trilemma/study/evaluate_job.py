"""The jobs that measure an artefact: its clean metrics, an attack with all the artefacts it is tried on, its cost."""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.attack import Attack
from trilemma.attacks.evasion.specs import AutoAttack, EvasionSpec
from trilemma.attacks.evasion.types import Access
from trilemma.attacks.poisoning.triggers import triggered
from trilemma.compression.multiply_adds import multiply_adds
from trilemma.data.images import png_bytes
from trilemma.data.records import Dataset, Records
from trilemma.evaluation.backdoors import backdoor_measurements
from trilemma.evaluation.clean import clean_measurements
from trilemma.evaluation.cost import cost_measurements
from trilemma.evaluation.harness import Target, agreement_measurements, attack_images, attacked_logits, clean_logits
from trilemma.evaluation.measurement import Measurement, Outcome, on_split
from trilemma.evaluation.metrics import predictions
from trilemma.evaluation.robustness import robust_auroc, robust_measurements, worst_logits
from trilemma.evaluation.specs import Backdoor, Clean, Cost, EvaluationSpec, Transfer
from trilemma.results import Example
from trilemma.study.files import open_model
from trilemma.study.keys import evaluation_key
from trilemma.study.plan import Cell
from trilemma.study.provenance import provenance
from trilemma.study.rows import EvaluationRow
from trilemma.study.workplace import Workplace

#: Test images that the report shows for every white-box attack.
NUM_EXAMPLES = 3


@dataclass(frozen=True)
class AttackTask:
    """An attack made once on a source and tried on several artefacts.

    Attributes:
        spec: What is made on the source.
        source: The artefact whose gradients it follows.
        white_box: Whether the source itself is judged, under `spec`.
        transfer: How the study names the attack on others, or None.
        targets: The others.
        clean: Artefact key -> logits on clean images, for the source and every target.
    """

    spec: EvasionSpec
    source: Cell
    white_box: bool
    transfer: Transfer | None
    targets: tuple[Cell, ...]
    clean: dict[str, np.ndarray]


def clean_job(place: Workplace, cell: Cell) -> EvaluationRow:
    """Measures an artefact on the test images as they are."""
    place.enter()
    started, spec = time.perf_counter(), cell.training.spec
    dataset = place.dataset(spec.data)
    test, partition = dataset.test, spec.partition.make()(dataset, spec.seed)
    target = open_target(place, cell)
    logits_NK = clean_logits(target, test)
    measurements = clean_measurements(
        logits_NK,
        test.labels_N,
        test.units(),
        partition.test_client_N,
        partition.clients,
        spec.seed,
        spec.threat.malicious(len(partition.clients)),
    )
    measurements += agreement_measurements(target, logits_NK, test)
    return _row(place, cell, Clean(), (), started, measurements, [Outcome(logits_NK)])


def attack_job(place: Workplace, attack: AttackTask) -> list[EvaluationRow]:
    """Makes an attack on its source and judges it on the source, the targets, or both.

    Every row bears an equal share of the job's time, so that the rows' seconds add up to what was spent.
    """
    place.enter()
    started, spec = time.perf_counter(), attack.source.training.spec
    dataset = place.dataset(spec.data)
    source = open_target(place, attack.source)
    cells = ((attack.source,) if attack.white_box else ()) + attack.targets
    targets = [source if cell is attack.source else open_target(place, cell) for cell in cells]
    made = [_made(attack, source, targets, budget, dataset.test) for budget in attack.spec.budgets]
    rows = []
    for position, cell in enumerate(cells):
        outcomes = [
            Outcome(logits[position], budget.radius, None if cell is attack.source else attack.source.key)
            for (logits, _), budget in zip(made, attack.spec.budgets, strict=True)
        ]
        measurements = _robust(outcomes, attack.clean[cell.key], dataset.test, spec.seed)
        if cell is attack.source:
            measurements += [measurement for _, scores in made for measurement in scores]
            examples = _examples(place, attack, source, dataset)
            rows.append(_row(place, cell, attack.spec, (), started, measurements, outcomes, examples))
        elif attack.transfer is not None:
            rows.append(_row(place, cell, attack.transfer, (attack.source.key,), started, measurements, outcomes))
    share = (time.perf_counter() - started) / max(len(rows), 1)
    return [replace(row, seconds=share) for row in rows]


def _made(
    attack: AttackTask, source: Target, targets: list[Target], budget: Budget, test: Records
) -> tuple[list[np.ndarray], list[Measurement]]:
    """Returns every target's logits under an attack at one radius, and the source's AUROC where the attack gives one.

    Images that shall transfer, and those that give the AUROC, are driven to the highest loss. Where that takes an
    attack of its own, its answers count for the source too, image by image; and so do those to images that the same
    attack makes on the models that the source was made from.
    """
    seed, scored = attack.source.training.spec.seed, attack.spec.scored if attack.white_box else None
    stop = not attack.targets and scored != attack.spec
    evasion = attack.spec.make(source.access, stop=stop)
    logits = attacked_logits(source.twin, targets, evasion, budget, test, seed)
    more, scores = _from_surrogates(attack, source, budget, test), []
    if scored is not None:
        scored_NK = logits[0]
        if scored != attack.spec:
            full = scored.make(source.access, stop=False)
            (scored_NK,) = attacked_logits(source.twin, [source], full, budget, test, seed)
            more.append(scored_NK)
        scores.append(robust_auroc(scored_NK, test.labels_N, test.units(), budget.radius, seed))
    if more:
        clean_NK = attack.clean[attack.source.key]
        logits[0] = np.asarray(worst_logits([logits[0], *more], clean_NK, test.labels_N))
    return logits, scores


def _from_surrogates(attack: AttackTask, source: Target, budget: Budget, test: Records) -> list[np.ndarray]:
    """Returns the source's logits on images that a gradient attack makes on its surrogates; the source says who broke.

    An ensemble that has its own transfers, and attacks without gradients, make none.
    """
    if not attack.white_box or not attack.spec.sees_gradients or isinstance(attack.spec, AutoAttack):
        return []
    seed, evasion = attack.source.training.spec.seed, attack.spec.make(Access(source.predict))
    return [attacked_logits(model, [source], evasion, budget, test, seed)[0] for model in source.surrogates]


def backdoor_job(place: Workplace, cell: Cell, spec: Backdoor, clean_NK: np.ndarray) -> EvaluationRow:
    """Measures what a trigger does to an artefact; the whole test split is given the trigger."""
    place.enter()
    started = time.perf_counter()
    test = place.dataset(cell.training.spec.data).test
    mark = spec.trigger.mark(test.images_NCHW.shape[-1])
    marked = replace(test, images_NCHW=triggered(test.images_NCHW, mark))
    triggered_NK = clean_logits(open_target(place, cell), marked)
    measurements = backdoor_measurements(clean_NK, triggered_NK, test.labels_N, test.units(), spec.target)
    outcomes = [Outcome(triggered_NK)]
    examples = _trigger_example(place, cell, spec, marked, clean_NK, triggered_NK)
    return _row(place, cell, spec, (), started, measurements, outcomes, examples)


def _trigger_example(
    place: Workplace,
    cell: Cell,
    spec: Backdoor,
    marked: Records,
    clean_NK: np.ndarray,
    triggered_NK: np.ndarray,
) -> list[Example]:
    """Returns the first image of another class, which shows the trigger; one that it turned, where it turns any."""
    dataset = place.dataset(cell.training.spec.data)
    finite_N = np.isfinite(clean_NK).all(1) & np.isfinite(triggered_NK).all(1)
    others_N = finite_N & (marked.labels_N != spec.target)
    turned_N = others_N & (predictions(triggered_NK) == spec.target) & (predictions(clean_NK) == marked.labels_N)
    shown = np.flatnonzero(turned_N if turned_N.any() else others_N)[:1]
    return [
        _example(
            cell.key,
            spec.label,
            dataset,
            dataset.test.x([n])[0],
            marked.x([n])[0],
            torch.from_numpy(clean_NK[n]),
            torch.from_numpy(triggered_NK[n]),
            n,
        )
        for n in shown.tolist()
    ]


def cost_job(place: Workplace, cell: Cell, spec: Cost) -> EvaluationRow:
    """Measures the file's size, its multiply-adds and its latency; nothing else may run beside it."""
    place.enter()
    started = time.perf_counter()
    path, twin = place.files.model(cell.key), place.twin(cell)
    session = open_model(path, threads=1)
    counted = multiply_adds(twin, session.image_shape)
    measurements = cost_measurements(session, path.stat().st_size, counted, spec.repeats)
    return _row(place, cell, spec, (), started, measurements, [])


def open_target(place: Workplace, cell: Cell) -> Target:
    """Returns an artefact ready to be attacked: the session on its file, and its twin."""
    session = open_model(place.files.model(cell.key), place.threads)
    training = cell.training
    compressed = cell.compression.kind != "none"
    surrogates = (place.trained(training.spec, training.key),) if compressed else ()
    return Target(cell.key, session.predict, place.twin(cell), surrogates)


def _robust(outcomes: list[Outcome], clean_NK: np.ndarray, test: Records, seed: int) -> list[Measurement]:
    found = []
    for outcome in outcomes:
        assert outcome.radius is not None  # clean outcomes are not attacks
        found += robust_measurements(
            outcome.logits_NK, clean_NK, test.labels_N, test.units(), outcome.radius, outcome.source, seed
        )
    return found


def _row(
    place: Workplace,
    cell: Cell,
    spec: EvaluationSpec,
    sources: tuple[str, ...],
    started: float,
    measurements: list[Measurement],
    outcomes: list[Outcome],
    examples: list[Example] | None = None,
) -> EvaluationRow:
    return EvaluationRow(
        key=evaluation_key(cell.key, spec, sources),
        artefact_key=cell.key,
        spec={**spec.model_dump(mode="json"), "label": name_of(place, cell, spec)},
        provenance=provenance(place.torch_device),
        seconds=time.perf_counter() - started,
        measurements=on_split(measurements, cell.training.spec.data.evaluate_on),
        outcomes=tuple(outcomes),
        examples=tuple(examples or ()),
    )


def name_of(place: Workplace, cell: Cell, spec: EvaluationSpec) -> str:
    """Returns an evaluation's label as run on these data: an AutoAttack says which variant it was."""
    return spec.name(len(place.dataset(cell.training.spec.data).classes)) if isinstance(spec, Attack) else spec.label


def _examples(place: Workplace, attack: AttackTask, source: Target, dataset: Dataset) -> list[Example]:
    """Returns images for the report: of each class the first that the model answers rightly, at the largest radius.

    None whose answers are not finite, before or under attack: they have no confidence to show.
    """
    clean_NK, budget = attack.clean[attack.source.key], attack.spec.budgets[-1]
    right_N = (predictions(clean_NK) == dataset.test.labels_N) & np.isfinite(clean_NK).all(1)
    firsts = [np.flatnonzero(right_N & (dataset.test.labels_N == label))[:1] for label in range(len(dataset.classes))]
    chosen = np.concatenate(firsts)[:NUM_EXAMPLES].astype(int)
    if not len(chosen):
        return []
    records = dataset.test.subset(chosen)
    x_BCHW = records.x()
    x_adv_BCHW = attack_images(
        source.twin, attack.spec.make(source.access), budget, records, attack.source.training.spec.seed
    )
    adversarial_BK = source.predict(x_adv_BCHW)
    title = f"{attack.spec.name(len(dataset.classes))}, radius {budget.radius:.4g}"
    clean_BK = torch.from_numpy(clean_NK[chosen])
    return [
        _example(attack.source.key, title, dataset, x_BCHW[i], x_adv_BCHW[i], clean_BK[i], adversarial_BK[i], n)
        for i, n in enumerate(chosen.tolist())
        if bool(adversarial_BK[i].isfinite().all())
    ]


def _example(
    key: str,
    title: str,
    dataset: Dataset,
    clean_CHW: torch.Tensor,
    adversarial_CHW: torch.Tensor,
    clean_K: torch.Tensor,
    adversarial_K: torch.Tensor,
    position: int,
) -> Example:
    change_CHW = adversarial_CHW - clean_CHW
    scale = 0.5 / max(float(change_CHW.abs().max()), 1e-6)  # the largest change becomes black or white on grey
    return Example(
        artefact_key=key,
        title=title,
        clean_png=png_bytes(clean_CHW.numpy()),
        perturbation_png=png_bytes((0.5 + change_CHW * scale).clamp(0, 1).numpy()),
        adversarial_png=png_bytes(adversarial_CHW.numpy()),
        scale=scale,
        truth=dataset.classes[int(dataset.test.labels_N[position])],
        clean_prediction=_prediction(clean_K, dataset.classes),
        adversarial_prediction=_prediction(adversarial_K, dataset.classes),
    )


def _prediction(logits_K: torch.Tensor, classes: tuple[str, ...]) -> tuple[str, float]:
    confidence, label = logits_K.softmax(0).max(0)
    return classes[int(label)], float(confidence)
