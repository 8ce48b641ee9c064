"""The Adversarial Robustness Toolbox as an outside oracle: how far its images are from the clean ones."""

import warnings

import torch
from torch import Tensor, nn

from trilemma.models.classifier import Classifier


def deepfool_distances(classifier: Classifier, x: Tensor, *, steps: int) -> Tensor:
    """L2 distances of its DeepFool, infinite where it found nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the toolbox's own imports
        from art.attacks.evasion import DeepFool
    attack = DeepFool(_estimator(classifier, x), max_iter=steps, batch_size=len(x), verbose=False)
    return _distances(classifier, x, attack.generate(x.numpy()))


def carlini_wagner_distances(classifier: Classifier, x: Tensor, *, steps: int, searches: int) -> Tensor:
    """L2 distances of its Carlini-Wagner attack, infinite where it found nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.attacks.evasion import CarliniL2Method
    attack = CarliniL2Method(
        _estimator(classifier, x), max_iter=steps, binary_search_steps=searches, batch_size=len(x), verbose=False
    )
    return _distances(classifier, x, attack.generate(x.numpy()))


def _estimator(classifier: Classifier, x: Tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.estimators.classification import PyTorchClassifier
    return PyTorchClassifier(
        model=classifier,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=classifier.num_classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


def _distances(classifier: Classifier, x: Tensor, found) -> Tensor:
    x_adv = torch.from_numpy(found)
    with torch.no_grad():
        wrong = classifier(x_adv).argmax(1) != classifier(x).argmax(1)
    return torch.where(wrong, (x_adv - x).flatten(1).norm(dim=1), torch.inf)
