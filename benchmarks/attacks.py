"""What attacks cost: PGD-20 and AutoAttack, ours and the Adversarial Robustness Toolbox's (ART), on the same models.

Both attack the same images of phantoms within the same radius, a robust model and an undefended one. ART's AutoAttack
has the parts that it has for three classes, with one start each and the steps and queries of ours: by default it takes
five starts of each, and longer. Ours asks the exported file, as every study does: that is what ships. Robust accuracy
is judged by the network for both. Also how long one inner step of an attack takes over a plain SGD step.
"""

import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import mean, median

import numpy as np
import torch
from art.attacks.evasion import (
    AutoAttack,
    AutoProjectedGradientDescent,
    DeepFool,
    ProjectedGradientDescent,
    SquareAttack,
)
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from benchmarks._bench import Row, interleaved_seconds, main, ratio_rows
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.autoattack import QUERIES, STEPS, autoattack
from trilemma.attacks.evasion.frozen import frozen, logits_and_gradient
from trilemma.attacks.evasion.geometry import project, steepest_step
from trilemma.attacks.evasion.losses import cross_entropy
from trilemma.attacks.evasion.pgd import pgd
from trilemma.compression.export import export_onnx
from trilemma.compression.session import Session
from trilemma.data.roots import default_roots
from trilemma.data.specs import Phantom
from trilemma.federation.round import run_round
from trilemma.federation.specs import Centralised, Local, TrainSpec
from trilemma.federation.training import initial_state, prepare, trained_model
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9
from trilemma.robustness.specs import DefenceSpec, NoDefence, PgdTraining

BUDGET = Budget("linf", 8 / 255)
PGD_STEPS = 20
#: Test images that are attacked at once: as many as a study does, and fewer where that would take hours.
NUM_IMAGES = {"pgd20": 256, "autoattack": 64}
#: How often both sides are run in turn; an AutoAttack of a robust model takes minutes.
TURNS = {"pgd20": 5, "autoattack": 2}
DATA = Phantom(size=28, classes=3, train=1500)
DEFENCES: dict[str, DefenceSpec] = {
    "robust": PgdTraining(radius=BUDGET.radius, steps=3, warmup=0.5),
    "undefended": NoDefence(),
}


def model(defence: DefenceSpec) -> tuple[Classifier, Tensor, Tensor]:
    """Returns a trained classifier, test images and their labels."""
    spec = TrainSpec(
        data=DATA,
        model=Resnet9(width=16),
        algorithm=Centralised(),
        local=Local(optimizer="adam", learning_rate=0.002, batch_size=32, schedule="cosine"),
        defence=defence,
        rounds=12,
    )
    dataset = spec.data.load(default_roots())
    federation = prepare(spec, dataset, torch.device("cpu"))
    state = initial_state(federation)
    while state.round < spec.rounds:
        state = run_round(federation, state)
    first = slice(0, max(NUM_IMAGES.values()))
    return trained_model(federation, state), dataset.test.x(first), dataset.test.y(first)


def peer(classifier: Classifier, x_BCHW: Tensor) -> PyTorchClassifier:
    """Returns ART's view of a classifier."""
    return PyTorchClassifier(
        model=classifier,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x_BCHW.shape[1:]),
        nb_classes=classifier.num_classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


def attacks(classifier: Classifier, x_BCHW: Tensor, y_B: Tensor) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Returns attack -> who -> a run of it, which returns the images."""
    radius, batch, theirs = BUDGET.radius, len(x_BCHW), peer(classifier, x_BCHW)
    session = Session(export_onnx(classifier, *x_BCHW.shape[1:3]))
    x, y = x_BCHW.numpy(), y_B.numpy()

    def generate(attack: ProjectedGradientDescent | AutoAttack) -> Tensor:
        np.random.seed(0)  # the toolbox draws from the global generator
        return torch.from_numpy(np.asarray(attack.generate(x, y)))

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    art_pgd = ProjectedGradientDescent(
        theirs, eps=radius, eps_step=2.5 / PGD_STEPS * radius, max_iter=PGD_STEPS, num_random_init=1, batch_size=batch,
        verbose=False,
    )  # fmt: skip
    ascent = partial(
        AutoProjectedGradientDescent, theirs, eps=radius, eps_step=2 * radius, max_iter=STEPS, nb_random_init=1,
        batch_size=batch, verbose=False,
    )  # fmt: skip
    parts = [
        ascent(loss_type="cross_entropy"),
        ascent(loss_type="difference_logits_ratio"),
        DeepFool(theirs, max_iter=STEPS, epsilon=1e-3, nb_grads=10, batch_size=batch, verbose=False),
        SquareAttack(theirs, eps=radius, max_iter=QUERIES, p_init=0.8, nb_restarts=1, batch_size=batch, verbose=False),
    ]
    art_auto = AutoAttack(theirs, eps=radius, attacks=parts, batch_size=batch)
    return {
        "pgd20": {
            "trilemma": lambda: pgd(classifier, x_BCHW, y_B, BUDGET, draws(), steps=PGD_STEPS),
            "art": lambda: generate(art_pgd),
        },
        "autoattack": {
            "trilemma": lambda: autoattack(classifier, x_BCHW, y_B, BUDGET, draws(), answers=session.predict),
            "art": lambda: generate(art_auto),
        },
    }


def compared(name: str, runs: dict[str, Callable[[], Tensor]], robust: Callable[[Tensor], float]) -> list[Row]:
    """Returns the speedup over ART, over all turns and its ends, and both sides' seconds and robust accuracies."""
    seconds: dict[str, list[float]] = {who: [] for who in runs}
    accuracies: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(TURNS[name.partition("/")[0]]):
        for who, run in runs.items():
            started = time.perf_counter()
            x_adv_BCHW = run()
            seconds[who].append(time.perf_counter() - started)
            accuracies[who].append(robust(x_adv_BCHW))
    ratios = [theirs / ours for ours, theirs in zip(seconds["trilemma"], seconds["art"], strict=True)]
    gap = mean(accuracies["trilemma"]) - mean(accuracies["art"])
    rows = [
        Row(name, "robust_accuracy_gap", gap, "fraction"),
        Row(name, "speedup", median(ratios), "ratio"),
        Row(name, "speedup_lowest", min(ratios), "ratio"),
        Row(name, "speedup_highest", max(ratios), "ratio"),
    ]
    for who in runs:
        rows.append(Row(f"{name}/{who}", "seconds", median(seconds[who]), "seconds"))
        rows.append(Row(f"{name}/{who}", "robust_accuracy", mean(accuracies[who]), "fraction"))
    return rows


def inner_steps() -> list[Row]:
    """Returns the time of one step of an attack over that of a plain SGD step, for a narrow and a wide network."""
    rows: list[Row] = []
    for width in (16, 64):
        classifier = Resnet9(width=width).make(1, 28, 3, seed=0).train()
        draws = torch.Generator().manual_seed(0)
        x_BCHW, y_B = torch.rand(64, 1, 28, 28, generator=draws), torch.randint(3, (64,), generator=draws)
        optimizer = torch.optim.SGD(classifier.parameters(), lr=0.0)

        def plain(classifier=classifier, x_BCHW=x_BCHW, y_B=y_B, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(x_BCHW), y_B).backward()
            optimizer.step()

        def inner(classifier=classifier, x_BCHW=x_BCHW, y_B=y_B) -> None:
            with frozen(classifier):
                _, gradient_BCHW = logits_and_gradient(classifier, x_BCHW, lambda z: cross_entropy(z, y_B))
                project(x_BCHW + steepest_step(gradient_BCHW, 0.01, "linf"), x_BCHW, BUDGET)

        names = {"plain": f"sgd-step/w{width}", "inner": f"inner-step/w{width}"}
        times = interleaved_seconds({names["plain"]: plain, names["inner"]: inner}, 15)
        rows += ratio_rows(times, names["plain"], "step_ratio")
    return rows


def measure() -> list[Row]:
    """Returns every speedup and the ratio of the inner step."""
    warnings.simplefilter("ignore")
    rows = inner_steps()
    for label, defence in DEFENCES.items():
        classifier, all_BCHW, labels_B = model(defence)
        for name, num_images in NUM_IMAGES.items():
            x_BCHW, y_B = all_BCHW[:num_images], labels_B[:num_images]

            def robust(x_adv_BCHW: Tensor, classifier=classifier, x_BCHW=x_BCHW, y_B=y_B) -> float:
                with torch.no_grad():
                    right_B = classifier(x_BCHW).argmax(1) == y_B
                    still_B = classifier(project(x_adv_BCHW, x_BCHW, BUDGET)).argmax(1) == y_B
                return float((right_B & still_B).float().mean())

            rows.append(Row(f"{name}/{label}", "clean_accuracy", robust(x_BCHW), "fraction"))
            rows += compared(f"{name}/{label}", attacks(classifier, x_BCHW, y_B)[name], robust)
    return rows


if __name__ == "__main__":
    main("attacks", measure)
