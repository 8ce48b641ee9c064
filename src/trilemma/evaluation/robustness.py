"""What is left of a model under attack, image by image.

An image counts as robust only if its clean version is classified correctly and every attacked one is too: the worst
of all versions is what an attacker would use.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trilemma.evaluation import metrics
from trilemma.evaluation.estimates import auroc, class_rates, draws, share
from trilemma.evaluation.measurement import Measurement
from trilemma.evaluation.metrics import Floats, Integers


def robust_measurements(
    logits_adv_NK: Floats,
    logits_clean_NK: Floats,
    labels_N: Integers,
    units_N: Integers,
    radius: float,
    source: str | None,
    seed: int,
) -> list[Measurement]:
    """Returns robust_accuracy and what stands beside it, at one radius.

    - robust_accuracy: share of images that are classified correctly, clean and attacked.
    - robust_accuracy_among_correct: the same among those classified correctly when clean.
    - attack_success_rate: 1 minus that.
    - sensitivity, specificity: under attack; an image that is wrong when clean keeps its wrong answer.
    - above_majority: 1 where robust_accuracy exceeds what always answering the most frequent class would reach,
      else 0 with the reason. At or below it a model is constant or worse, not robust.

    Args:
        logits_adv_NK: The shipped model's logits on the judged images.
        logits_clean_NK: Its logits on the clean images.
        labels_N: True classes.
        units_N: The patient of every record.
        radius: The attack's radius, in pixel units.
        source: The artefact on which the images were made; None for the artefact itself or the worst of several.
        seed: Seed of the bootstrap.
    """
    correct_clean_N = metrics.predictions(logits_clean_NK) == labels_N
    worst_NK = worst_logits([logits_adv_NK], logits_clean_NK, labels_N)
    answers_N = metrics.predictions(worst_NK)
    robust_N = answers_N == labels_N
    kept_M, units_M = robust_N[correct_clean_N], units_N[correct_clean_N]
    robust = share("robust_accuracy", robust_N, units_N, "test record")
    rates = class_rates(answers_N, labels_N, logits_clean_NK.shape[1], units_N, draws(units_N, seed))
    found = [
        robust,
        share("robust_accuracy_among_correct", kept_M, units_M, "image that is classified correctly when clean"),
        share("attack_success_rate", ~kept_M, units_M, "image that is classified correctly when clean"),
        *rates,
        _above_majority(robust_N, labels_N),
    ]
    return [measurement._replace(radius=radius, source=source) for measurement in found]


def robust_auroc(logits_adv_NK: Floats, labels_N: Integers, units_N: Integers, radius: float, seed: int) -> Measurement:
    """Returns the AUROC under attack, where every image was driven to its highest margin.

    Positives are pushed down and negatives up, whether the answer has changed already or not. The images of an attack
    that stops when the answer changes, or keeps the clean image where it does not, would give a value that is too high.

    Args:
        logits_adv_NK: The shipped model's logits on images of a full-budget attack on the margin.
        labels_N: True classes.
        units_N: The patient of every record.
        radius: The attack's radius, in pixel units.
        seed: Seed of the bootstrap.
    """
    return auroc("robust_auroc", logits_adv_NK, labels_N, draws(units_N, seed))._replace(radius=radius)


def worst_logits(logits_adv: Sequence[Floats], logits_clean_NK: Floats, labels_N: Integers) -> Floats:
    """Returns for every image the first logits that are wrong, clean ones before attacked ones; else the last.

    With the logits of several attacks or sources this is the attack that uses all of them, for
    `robust_measurements`.
    """
    chosen_NK = logits_clean_NK
    for logits_NK in logits_adv:
        correct_N = metrics.predictions(chosen_NK) == labels_N
        chosen_NK = np.where(correct_N[:, None], logits_NK, chosen_NK)
    return chosen_NK


def _above_majority(robust_N: NDArray[np.bool_], labels_N: Integers) -> Measurement:
    if not len(labels_N):
        return Measurement("above_majority", None, unit="count", status="undefined", reason="there is no test record")
    majority = float((labels_N == metrics.majority_class(labels_N)).mean())
    robust = float(robust_N.mean())
    if robust > majority:
        return Measurement("above_majority", 1.0, n=len(labels_N), unit="count")
    reason = f"robust accuracy {robust:.3f} does not exceed always answering the most frequent class ({majority:.3f})"
    return Measurement("above_majority", 0.0, n=len(labels_N), unit="count", reason=reason)
