"""Images made on other models, tried on the model that ships."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.all_at_once import in_turn
from trilemma.attacks.evasion.types import Evasion, Oracle
from trilemma.models.classifier import Classifier


def transfer(
    classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    surrogates: Sequence[Classifier],
    attack: Evasion,
    answers: Oracle | None = None,
) -> Tensor:
    """Returns for each image the first of the surrogates' that the model that ships errs on.

    Where it errs on none, the one with its highest margin, the clean image among them. The model that ships gives
    answers only: neither its gradients nor the twin's are followed (unless the twin is a surrogate too).

    Guarantees: within the budget and [0, 1] where the attack is; radius 0 returns the images unchanged; the classifier
    and the surrogates are left as found; no image's result depends on another's.
    Cost: the attack on the whole batch for each surrogate until no image stands, and as many forward passes of the
    model that ships.
    References: Papernot et al. (2016), "Transferability in machine learning"; Dong et al. (2018), section 3.3.

    Args:
        classifier: The model that ships, where `answers` is None; else not used.
        x_BCHW: Clean images in [0, 1].
        y_B: True labels.
        budget: What may be changed.
        generator: Source of every surrogate's own generator.
        surrogates: Models whose images may transfer; on the device of the images.
        attack: Makes the images; it should go on for the highest loss once the surrogate errs (`stop=False`), for the
            model that ships may err a little later.
        answers: The model that ships; None where that is the classifier.
    """
    parts = [partial(_made_on, surrogate, attack) for surrogate in surrogates]
    return in_turn(parts, classifier, x_BCHW, y_B, budget, generator, answers=answers)


def _made_on(
    surrogate: Classifier,
    attack: Evasion,
    _classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
) -> Tensor:
    return attack(surrogate, x_BCHW, y_B, budget, generator)
