"""From records to a Measurement: the value, its interval, and why there is none where there is none."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trilemma.evaluation import metrics
from trilemma.evaluation.intervals import REPLICATES, bootstrap_weights, percentile_interval, share_interval
from trilemma.evaluation.measurement import Measurement
from trilemma.evaluation.metrics import Floats, Integers
from trilemma.randomness import numpy_generator

#: Bootstrap replicates that are computed together, which bounds the memory.
_CHUNK = 128


def share(metric: str, success_N: NDArray[np.bool_], units_N: Integers, of_what: str) -> Measurement:
    """Returns a share with Wilson's interval over patients; undefined without a record.

    Args:
        metric: Its name.
        success_N: Which records count.
        units_N: The patient of every record.
        of_what: What a record is, for the reason: "there is no ...".
    """
    if not len(success_N):
        return undefined(metric, f"there is no {of_what}")
    low, high = share_interval(success_N, units_N)
    return Measurement(metric, float(success_N.mean()), low, high, len(success_N))


def undefined(metric: str, reason: str, n: int = 0) -> Measurement:
    """Returns the measurement of a value that does not exist."""
    return Measurement(metric, None, n=n, status="undefined", reason=reason)


def draws(units_N: Integers, seed: int) -> Floats:
    """Returns weights_RN for `bootstrapped`: first a row of ones, for the value, then the bootstrap's replicates."""
    ones_1N = np.ones((1, len(units_N)), dtype=np.float32)
    if not len(units_N):
        return ones_1N
    return np.concatenate([ones_1N, bootstrap_weights(units_N, REPLICATES, numpy_generator(seed, "bootstrap"))])


def bootstrapped(
    metric: str, statistic: Callable[[Floats], Floats], weights_RN: Floats, reason: str, unit: str = "fraction"
) -> Measurement:
    """Returns a statistic with its percentile bootstrap interval.

    Args:
        metric: Its name.
        statistic: weights_RN -> values_R.
        weights_RN: From `draws`.
        reason: Why it is undefined, where it is.
        unit: Its unit.
    """
    n = weights_RN.shape[1]
    chunks = [weights_RN[start : start + _CHUNK] for start in range(0, len(weights_RN), _CHUNK)]
    values_R = np.concatenate([statistic(chunk.astype(np.float64)) for chunk in chunks])
    if not np.isfinite(values_R[0]):
        return undefined(metric, reason, n)._replace(unit=unit)
    low, high = percentile_interval(values_R[1:]) or (None, None)
    return Measurement(metric, float(values_R[0]), low, high, n, unit)


def auroc(metric: str, logits_NK: Floats, labels_N: Integers, weights_RN: Floats) -> Measurement:
    """Returns the area under the ROC curve with its bootstrap interval; undefined where an answer is not finite."""
    if not np.isfinite(logits_NK).all():
        return undefined(metric, not_finite(logits_NK), len(labels_N))
    missing = missing_class(labels_N, logits_NK.shape[1])
    return bootstrapped(metric, lambda weights: metrics.auroc(logits_NK, labels_N, weights), weights_RN, missing)


def not_finite(logits_NK: Floats) -> str:
    """Returns how many answers are not finite, as a reason."""
    broken = int((~np.isfinite(logits_NK)).any(1).sum())
    return f"the answers to {broken} of {len(logits_NK)} images are not finite"


def class_rates(
    predictions_N: Integers, labels_N: Integers, num_classes: int, units_N: Integers, weights_RN: Floats
) -> list[Measurement]:
    """Returns sensitivity and specificity.

    With two classes they are shares of the positive (class 1) and of the negative records, with Wilson's interval;
    with more they are macro averages of one class against the rest, with the bootstrap's.
    """
    if num_classes == 2:
        sick_N = labels_N == 1
        correct_N = predictions_N == labels_N
        return [
            share("sensitivity", correct_N[sick_N], units_N[sick_N], "record of the positive class"),
            share("specificity", correct_N[~sick_N], units_N[~sick_N], "record of the negative class"),
        ]

    def of(rate: Callable[[Floats], Floats]) -> Callable[[Floats], Floats]:
        return lambda weights: rate(metrics.confusion(predictions_N, labels_N, num_classes, weights))

    missing = missing_class(labels_N, num_classes)
    return [
        bootstrapped("sensitivity", of(metrics.sensitivity), weights_RN, missing),
        bootstrapped("specificity", of(metrics.specificity), weights_RN, missing),
    ]


def missing_class(labels_N: Integers, num_classes: int) -> str:
    """Returns which classes have no record, as a reason."""
    absent = sorted(set(range(num_classes)) - set(labels_N.tolist()))
    return f"no record of class {', '.join(map(str, absent))}" if absent else "the value is not finite"
