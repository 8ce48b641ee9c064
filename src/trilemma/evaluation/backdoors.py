"""What a backdoor does: how often a trigger turns an image of another class into the attacker's."""

import numpy as np

from trilemma.evaluation.estimates import share
from trilemma.evaluation.measurement import Measurement
from trilemma.evaluation.metrics import Floats, Integers, predictions


def backdoor_measurements(
    clean_NK: Floats, triggered_NK: Floats, labels_N: Integers, units_N: Integers, target: int
) -> list[Measurement]:
    """Returns what a trigger does to a model, with Wilson's intervals over patients.

    attack_success_rate: of the images of other classes, the share that is given the target's with the trigger on.
    trigger_effect: of those of them that are not given it as they are, the share that is given it with the trigger:
    an image that the model gets wrong anyway is no success. triggered_accuracy: of all images with the trigger.

    Args:
        clean_NK: The shipped model's logits on the test images as they are.
        triggered_NK: The same with the trigger on.
        labels_N: True classes.
        units_N: The patient of every record.
        target: The class that the attacker wants.
    """
    before_N, after_N = predictions(clean_NK), predictions(triggered_NK)
    others_N = labels_N != target
    moved_N = others_N & (before_N != target)
    return [
        share("attack_success_rate", after_N[others_N] == target, units_N[others_N], "image of another class"),
        share(
            "trigger_effect", after_N[moved_N] == target, units_N[moved_N], "image that is not given the class anyway"
        ),
        share("triggered_accuracy", np.asarray(after_N == labels_N), units_N, "test record"),
    ]
