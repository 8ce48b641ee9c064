"""The Adversarial Robustness Toolbox as an outside oracle: its images, and how far they are from the clean ones."""

import copy
import importlib
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trilemma.attacks.budget import Budget
from trilemma.models.classifier import Classifier


def deepfool_distances(classifier: Classifier, x: Tensor, *, steps: int) -> Tensor:
    """L2 distances of its DeepFool, infinite where it found nothing."""
    attack = _imported("attacks.evasion").DeepFool(
        estimator(classifier, x), max_iter=steps, batch_size=len(x), verbose=False
    )
    return _distances(classifier, x, attack.generate(x.numpy()))


def carlini_wagner_distances(classifier: Classifier, x: Tensor, *, steps: int, searches: int) -> Tensor:
    """L2 distances of its Carlini-Wagner attack, infinite where it found nothing."""
    attack = _imported("attacks.evasion").CarliniL2Method(
        estimator(classifier, x), max_iter=steps, binary_search_steps=searches, batch_size=len(x), verbose=False
    )
    return _distances(classifier, x, attack.generate(x.numpy()))


def attacked(name: str, classifier: Classifier, x: Tensor, y: Tensor, budget: Budget, seed: int = 0, **settings):
    """Returns the images that one of its attacks makes, all of a batch together.

    Args:
        name: The attack's class, such as "ProjectedGradientDescent".
        classifier: The classifier; it is attacked as a copy, which the toolbox leaves gradients on.
        x: Clean images in [0, 1].
        y: True labels.
        budget: The ball, for attacks that have one; the others look for the smallest perturbation.
        seed: Of the attack's draws.
        settings: The attack's own, by the toolbox's names.
    """
    if name in ("DeepFool", "CarliniL2Method"):
        ball: dict[str, Any] = {}
    elif name == "HopSkipJump":
        ball = {"norm": np.inf if budget.norm == "linf" else 2}
    else:
        ball = {"norm": np.inf if budget.norm == "linf" else 2, "eps": budget.radius}
    if name != "FastGradientMethod":
        settings = {"verbose": False} | settings
    kind = getattr(_imported("attacks.evasion"), name)
    attack = kind(estimator(copy.deepcopy(classifier), x), batch_size=len(x), **ball, **settings)
    return _generated(attack, x, y, seed)


def ensemble(
    classifier: Classifier, x: Tensor, y: Tensor, budget: Budget, seed: int = 0, *, steps: int, queries: int
) -> Tensor:
    """Returns the images of its AutoAttack over APGD-CE, APGD-DLR (from three classes on), DeepFool and Square.

    Args:
        classifier: The classifier; it is attacked as a copy.
        x: Clean images in [0, 1].
        y: True labels.
        budget: The ball.
        seed: Of the attacks' draws.
        steps: Of both APGD, from one start each, and of DeepFool.
        queries: Of Square.
    """
    art = _imported("attacks.evasion")
    model = estimator(copy.deepcopy(classifier), x)
    ball: dict[str, Any] = {"norm": np.inf if budget.norm == "linf" else 2, "eps": budget.radius}
    common: dict[str, Any] = {"batch_size": len(x), "verbose": False}
    losses = ["cross_entropy", "difference_logits_ratio"][: 1 if classifier.num_classes == 2 else 2]
    parts = [
        art.AutoProjectedGradientDescent(
            model, **ball, **common, eps_step=2 * budget.radius, max_iter=steps, nb_random_init=1, loss_type=loss
        )
        for loss in losses
    ]
    parts.append(art.DeepFool(model, max_iter=steps, epsilon=1e-3, nb_grads=10, **common))
    parts.append(art.SquareAttack(model, **ball, **common, max_iter=queries, p_init=0.8, nb_restarts=1))
    return _generated(art.AutoAttack(model, **ball, attacks=parts, batch_size=len(x)), x, y, seed)


class SinglePrecision(nn.Module):
    """Takes doubles too, which some of the toolbox's attacks make of an image."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x.float())


def estimator(classifier: Classifier, x: Tensor):
    """Returns the toolbox's view of a classifier."""
    return _imported("estimators.classification").PyTorchClassifier(
        model=SinglePrecision(classifier),
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=classifier.num_classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


def _imported(module: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the toolbox's own imports
        return importlib.import_module(f"art.{module}")


def _generated(attack, x: Tensor, y: Tensor, seed: int) -> Tensor:
    before = np.random.get_state()
    np.random.seed(seed)  # the toolbox draws from the global generator
    try:
        return torch.from_numpy(np.asarray(attack.generate(x.numpy(), y.numpy()), dtype=np.float32))
    finally:
        np.random.set_state(before)


def _distances(classifier: Classifier, x: Tensor, found) -> Tensor:
    x_adv = torch.from_numpy(found)
    with torch.no_grad():
        wrong = classifier(x_adv).argmax(1) != classifier(x).argmax(1)
    return torch.where(wrong, (x_adv - x).flatten(1).norm(dim=1), torch.inf)
