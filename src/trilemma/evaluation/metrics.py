"""Classification metrics over weighted records, for many weightings at once.

Every function takes weights_RN: R sets of weights over N records, such as the R replicates of a bootstrap (how often
each record was drawn) or a single row of ones. It returns values_R, with nan where a value is undefined, such as an
AUROC without a negative record; nobody reports a nan (see intervals.py).

With two classes, class 1 is the positive one. With more, sensitivity, specificity and AUROC are macro averages of
one class against the rest.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]

NUM_CALIBRATION_BINS = 15


def probabilities(logits_NK: Floats) -> Floats:
    """Returns the softmax of logits, float64."""
    shifted_NK = logits_NK.astype(np.float64) - logits_NK.max(1, keepdims=True)
    raised_NK = np.exp(shifted_NK)
    return raised_NK / raised_NK.sum(1, keepdims=True)


def predictions(logits_NK: Floats) -> Integers:
    """Returns the class of the largest logit, the first of equal ones; K, which is wrong for all, where one is nan."""
    answers_N = np.nan_to_num(logits_NK, nan=-np.inf).argmax(1)
    return np.where(np.isnan(logits_NK).any(1), logits_NK.shape[1], answers_N)


def confusion(predictions_N: Integers, labels_N: Integers, num_classes: int, weights_RN: Floats) -> Floats:
    """Returns weighted counts (R, K, K + 1): true class by predicted class, the last column for no valid answer."""
    cells = num_classes * (num_classes + 1)
    cell_N = labels_N * (num_classes + 1) + predictions_N
    onehot_NC = (cell_N[:, None] == np.arange(cells)).astype(np.float64)
    return (weights_RN @ onehot_NC).reshape(len(weights_RN), num_classes, num_classes + 1)


def accuracy(confusion_RKP: Floats) -> Floats:
    """Returns the share of correct answers."""
    return _ratio(_hits(confusion_RKP).sum(1), confusion_RKP.sum((1, 2)))


def balanced_accuracy(confusion_RKP: Floats) -> Floats:
    """Returns the mean recall over classes; undefined where a class has no record."""
    return _ratio(_hits(confusion_RKP), confusion_RKP.sum(2)).mean(1)


def sensitivity(confusion_RKP: Floats) -> Floats:
    """Returns the share of positives that were found; its macro average with more than two classes."""
    recall_RK = _ratio(_hits(confusion_RKP), confusion_RKP.sum(2))
    return recall_RK[:, 1] if recall_RK.shape[1] == 2 else recall_RK.mean(1)


def specificity(confusion_RKP: Floats) -> Floats:
    """Returns the share of negatives that were left alone; its macro average with more than two classes.

    A record without a valid answer was not left alone: it counts against the specificity.
    """
    positives_RK = confusion_RKP.sum(2)
    negatives_RK = positives_RK.sum(1, keepdims=True) - positives_RK
    alarms_RK = confusion_RKP[:, :, :-1].sum(1) - _hits(confusion_RKP)
    invalid_R1 = confusion_RKP[:, :, -1:].sum(1)
    invalid_RK = invalid_R1 - confusion_RKP[:, :, -1]  # among the negatives of each class
    spared_RK = _ratio(negatives_RK - alarms_RK - invalid_RK, negatives_RK)
    return spared_RK[:, 1] if spared_RK.shape[1] == 2 else spared_RK.mean(1)


def mcc(confusion_RKP: Floats) -> Floats:
    """Returns the Matthews correlation coefficient, for K > 2 the R_K statistic (Gorodkin, 2004), in [-1, 1].

    0 where the model always answers the same, its limit and scikit-learn's convention; undefined where the labels
    are all the same.
    """
    actual_RK = confusion_RKP.sum(2)
    predicted_RP = confusion_RKP.sum(1)
    total_R = actual_RK.sum(1)
    both_RK = actual_RK * predicted_RP[:, :-1]
    covariance_R = _hits(confusion_RKP).sum(1) * total_R - both_RK.sum(1)
    spread_of_labels_R = total_R**2 - (actual_RK**2).sum(1)
    spread_of_answers_R = total_R**2 - (predicted_RP**2).sum(1)
    value_R = _ratio(covariance_R, np.sqrt(np.maximum(spread_of_labels_R * spread_of_answers_R, 0)))
    return np.where((spread_of_answers_R <= 0) & (spread_of_labels_R > 0), 0.0, value_R)


def auroc(logits_NK: Floats, labels_N: Integers, weights_RN: Floats) -> Floats:
    """Returns the area under the ROC curve; ties count half.

    With two classes the score is the difference of the logits. With more it is the class's probability, and the
    value is the mean over classes against the rest (Provost and Domingos, 2000, unweighted).
    """
    num_classes = logits_NK.shape[1]
    if num_classes == 2:
        return _area(logits_NK[:, 1].astype(np.float64) - logits_NK[:, 0], labels_N == 1, weights_RN)
    scores_NK = probabilities(logits_NK)
    areas = [_area(scores_NK[:, k], labels_N == k, weights_RN) for k in range(num_classes)]
    return np.mean(areas, axis=0)


def expected_calibration_error(logits_NK: Floats, labels_N: Integers, weights_RN: Floats) -> Floats:
    """Returns the mean distance between confidence and accuracy over 15 equally wide bins (Guo et al., 2017)."""
    confidence_N = probabilities(logits_NK).max(1)
    correct_N = predictions(logits_NK) == labels_N
    bin_N = np.clip(np.ceil(confidence_N * NUM_CALIBRATION_BINS).astype(int) - 1, 0, NUM_CALIBRATION_BINS - 1)
    gap_NB = (bin_N[:, None] == np.arange(NUM_CALIBRATION_BINS)) * (confidence_N - correct_N)[:, None]
    return _ratio(np.abs(weights_RN @ gap_NB).sum(1), weights_RN.sum(1))


def majority_class(labels_N: Integers) -> int:
    """Returns the most frequent class, the first of equally frequent ones; 0 without a record."""
    return int(np.bincount(labels_N).argmax()) if len(labels_N) else 0


def _area(scores_N: Floats, positive_N: NDArray[np.bool_], weights_RN: Floats) -> Floats:
    if not len(scores_N):
        return np.full(len(weights_RN), np.nan)
    order_N = np.argsort(scores_N, kind="stable")
    sorted_N = scores_N[order_N]
    starts_G = np.flatnonzero(np.r_[True, sorted_N[1:] != sorted_N[:-1]])  # one group per distinct score
    weights_RN = weights_RN[:, order_N].astype(np.float64)
    positive_RG = np.add.reduceat(weights_RN * positive_N[order_N], starts_G, axis=1)
    negative_RG = np.add.reduceat(weights_RN * ~positive_N[order_N], starts_G, axis=1)
    below_RG = np.cumsum(negative_RG, 1) - negative_RG
    wins_R = (positive_RG * (below_RG + negative_RG / 2)).sum(1)
    return _ratio(wins_R, positive_RG.sum(1) * negative_RG.sum(1))


def _hits(confusion_RKP: Floats) -> Floats:
    return np.diagonal(confusion_RKP[:, :, :-1], axis1=1, axis2=2)


def _ratio(above: Floats, below: Floats) -> Floats:
    """Returns above / below, nan where below is 0."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)
