"""AutoAttack (Croce and Hein, 2020): attacks that fail in different ways, without settings to tune."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.all_at_once import in_turn
from trilemma.attacks.evasion.apgd import apgd
from trilemma.attacks.evasion.fab import fab
from trilemma.attacks.evasion.pgd import pgd
from trilemma.attacks.evasion.square import square
from trilemma.attacks.evasion.transfer import transfer
from trilemma.attacks.evasion.types import Evasion, Oracle
from trilemma.models.classifier import Classifier

Effort = Literal["full", "quick"]

#: Steps per start and target, and questions per image, of the standard version; its targets at most.
STEPS, QUERIES, TARGETS = 100, 5000, 9

#: What a quick run divides steps and queries by.
QUICK = 5

#: Random starts on the margin where there are two classes and so no other target.
BINARY_RESTARTS = 5

#: Steps of the images that shall transfer; both efforts have them.
TRANSFER_STEPS = 20


def variant(num_classes: int) -> str:
    """Returns the name of the ensemble for a number of classes; results of different ones are not comparable.

    - "binary variant", 2 classes: APGD-CE, APGD on the margin from 5 starts, FAB, Square.
    - "3-class variant": APGD-CE, APGD-DLR, APGD on the margin towards both wrong classes, FAB towards both, Square.
    - "standard", 4 classes and more: APGD-CE, APGD-DLR towards the 9 likeliest wrong classes or all there are, FAB
      towards as many, Square.
    """
    return {2: "binary variant", 3: "3-class variant"}.get(num_classes, "standard")


def autoattack(
    classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    effort: Effort = "full",
    answers: Oracle | None = None,
    surrogates: Sequence[Classifier] = (),
) -> Tensor:
    """Returns for each image the first that breaks the model that ships, over an ensemble of attacks in turn.

    The ensemble depends on the number of classes, see `variant`. The white-box parts follow the classifier's
    gradients, Square asks the model that ships, which judges all of them. Where other models' images may transfer,
    that is tried too: from every surrogate, and from the classifier itself where another model ships.

    Guarantees: within the budget and [0, 1]; radius 0 returns the images unchanged; the classifier and the surrogates
    are left as found; no image's result depends on another's.
    Cost: on an image that stands to the end, 100 forward and backward passes for each of 1 + 5 starts (2 classes), 4
    (3 classes) or 1 + K - 1, at most 10 (K classes), those of FAB (100 for each of K - 1, at most 9, targets) and 5000
    forward passes.
    References: Croce and Hein (2020), section 6, and their version "standard"; for fewer than four classes the parts
    that cannot be computed are replaced by the margin.

    Args:
        classifier: The classifier under attack.
        x_BCHW: Clean images in [0, 1].
        y_B: True labels.
        budget: What may be changed.
        generator: Source of the random starts and of the random search.
        effort: "full", or "quick" with a fifth of the steps of APGD and FAB and of the queries of Square.
        answers: The model that ships; None where that is the classifier.
        surrogates: Models whose images may transfer; on the device of the images.
    """
    parts = _parts(classifier, effort, answers, surrogates)
    return in_turn(parts, classifier, x_BCHW, y_B, budget, generator, answers=answers)


def _parts(
    classifier: Classifier, effort: Effort, answers: Oracle | None, surrogates: Sequence[Classifier]
) -> list[Evasion]:
    """Returns the attacks in their order: cheap before dear, the black box last."""
    shorter = QUICK if effort == "quick" else 1
    climb = partial(apgd, steps=STEPS // shorter, answers=answers)
    num_classes = classifier.num_classes
    num_targets = min(TARGETS, num_classes - 1)
    parts: list[Evasion] = [climb]
    if num_classes == 2:
        parts.append(partial(climb, loss="margin", restarts=BINARY_RESTARTS))
    elif num_classes == 3:
        parts += [partial(climb, loss="dlr"), partial(climb, loss="margin", num_targets=num_targets)]
    else:
        parts.append(partial(climb, loss="dlr", num_targets=num_targets))
    sources = [*([] if answers is None else [classifier]), *surrogates]
    if sources:
        made = partial(pgd, steps=TRANSFER_STEPS, loss="margin", stop=False)
        parts.append(partial(transfer, surrogates=sources, attack=made, answers=answers))
    parts.append(partial(fab, steps=STEPS // shorter, num_targets=num_targets, answers=answers))
    parts.append(partial(square, queries=QUERIES // shorter, answers=answers))
    return parts
