"""What a model is worth on images as they are: every metric with its interval, per client and for the worst one."""

import numpy as np

from trilemma.evaluation import metrics
from trilemma.evaluation.estimates import (
    auroc,
    bootstrapped,
    class_rates,
    draws,
    missing_class,
    not_finite,
    share,
    undefined,
)
from trilemma.evaluation.measurement import Measurement
from trilemma.evaluation.metrics import Floats, Integers


def clean_measurements(
    logits_NK: Floats,
    labels_N: Integers,
    units_N: Integers,
    client_N: Integers,
    clients: tuple[str, ...],
    seed: int,
    malicious: tuple[int, ...] = (),
) -> list[Measurement]:
    """Returns the clean metrics of one artefact.

    Shares (accuracy, majority_accuracy, and sensitivity and specificity of two classes) have Wilson's interval over
    patients, the rest the percentile bootstrap over patients. Every client has accuracy and AUROC; the client
    "worst" repeats those of the client with the lowest accuracy, the first of equal ones, and "worst honest" those of
    the worst that is not malicious, where some are.

    Args:
        logits_NK: The shipped model's logits on the test split.
        labels_N: True classes.
        units_N: The patient of every record (`Records.units`).
        client_N: Position in `clients` of the client whose patients a record is like.
        clients: The clients' names.
        seed: Seed of the bootstrap.
        malicious: Positions of the clients on which the study's threat acts.
    """
    found = _overall(logits_NK, labels_N, units_N, seed)
    pairs = []
    for position, client in enumerate(clients):
        mine_N = client_N == position
        weights_RN = draws(units_N[mine_N], seed)
        of_client = (
            _accuracy(logits_NK[mine_N], labels_N[mine_N], units_N[mine_N]),
            auroc("auroc", logits_NK[mine_N], labels_N[mine_N], weights_RN),
        )
        pairs.append([measurement._replace(client=client) for measurement in of_client])
    found += [measurement for pair in pairs for measurement in pair]
    found += _worst(pairs, "worst")
    if malicious:
        found += _worst([pair for position, pair in enumerate(pairs) if position not in malicious], "worst honest")
    return found


def _worst(pairs: list[list[Measurement]], name: str) -> list[Measurement]:
    """Returns the measurements of the client with the lowest accuracy, under another name."""
    measured = [pair for pair in pairs if pair[0].value is not None]
    worst = min(measured, key=lambda pair: pair[0].value or 0.0, default=[])
    return [measurement._replace(client=name) for measurement in worst]


def _overall(logits_NK: Floats, labels_N: Integers, units_N: Integers, seed: int) -> list[Measurement]:
    num_classes = logits_NK.shape[1]
    answers_N = metrics.predictions(logits_NK)
    weights_RN = draws(units_N, seed)

    def balanced(weights: Floats) -> Floats:
        return metrics.balanced_accuracy(metrics.confusion(answers_N, labels_N, num_classes, weights))

    def correlation(weights: Floats) -> Floats:
        return metrics.mcc(metrics.confusion(answers_N, labels_N, num_classes, weights))

    missing = missing_class(labels_N, num_classes)
    always_N = np.full(len(labels_N), metrics.majority_class(labels_N))
    return [
        _accuracy(logits_NK, labels_N, units_N),
        bootstrapped("balanced_accuracy", balanced, weights_RN, missing),
        auroc("auroc", logits_NK, labels_N, weights_RN),
        bootstrapped("mcc", correlation, weights_RN, "all records are of one class", "coefficient"),
        *class_rates(answers_N, labels_N, num_classes, units_N, weights_RN),
        _calibration(logits_NK, labels_N, weights_RN),
        share("majority_accuracy", always_N == labels_N, units_N, "test record"),
    ]


def _accuracy(logits_NK: Floats, labels_N: Integers, units_N: Integers) -> Measurement:
    return share("accuracy", metrics.predictions(logits_NK) == labels_N, units_N, "test record")


def _calibration(logits_NK: Floats, labels_N: Integers, weights_RN: Floats) -> Measurement:
    name = "expected_calibration_error"
    if not len(labels_N):
        return undefined(name, "there is no test record")
    if not np.isfinite(logits_NK).all():
        return undefined(name, not_finite(logits_NK), len(labels_N))

    def error(weights: Floats) -> Floats:
        return metrics.expected_calibration_error(logits_NK, labels_N, weights)

    return bootstrapped(name, error, weights_RN, "the value is not finite")
