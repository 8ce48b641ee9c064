"""Several attacks in turn, of which for every image the worst counts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.frozen import frozen
from trilemma.attacks.evasion.losses import margin
from trilemma.attacks.evasion.search import Standing
from trilemma.attacks.evasion.types import Evasion, Oracle
from trilemma.models.classifier import Classifier
from trilemma.randomness import generator as derived_generator


def in_turn(
    parts: Sequence[Evasion],
    classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    answers: Oracle | None = None,
) -> Tensor:
    """Returns for each image the first that the model that ships errs on, else the one with its highest margin.

    The model that ships judges, whatever a part believes. Every part is given the whole batch, so that it draws the
    same numbers for an image whichever others are broken; in the place of a broken image it finds the image that
    broke it. An attack that lets broken images go has done with it at its first look, and what it makes of it
    does not count.

    Guarantees: within the budget and [0, 1] where every part is; radius 0 returns the images unchanged; the classifier
    is left as found; no image's result depends on another's, though every part has randomness of its own.
    Cost: for each part its own on the images that still stand (a broken image costs a forward pass; all of it in a part
    that lets none go, or where the twin does not see the error) and a forward pass of the model that ships. Once no
    image stands, nothing.
    References: Croce and Hein (2020), section 6, which takes the worst case over attacks.

    Args:
        parts: The attacks in their order, those first that break most at the lowest cost.
        classifier: The classifier that every part attacks.
        x_BCHW: Clean images in [0, 1].
        y_B: True labels.
        budget: What may be changed.
        generator: Source of one number, from which every part's own generator derives.
        answers: The model that ships; None where that is the classifier.
    """
    if budget.radius == 0 or len(x_BCHW) == 0:
        return x_BCHW.clone()
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with frozen(classifier):
        standing = Standing(_ships(classifier, answers), x_BCHW, y_B, margin)
        for position, part in enumerate(parts):
            index_M = standing.active()
            if not len(index_M):
                break
            broken_B111 = standing.broken_B[:, None, None, None]
            given_BCHW = torch.where(broken_B111, standing.worst_BCHW, x_BCHW)
            own = derived_generator(seed, "part", position, device=generator.device)
            standing.ask(index_M, part(classifier, given_BCHW, y_B, budget, own)[index_M])
    return standing.worst_BCHW


def _ships(classifier: Classifier, answers: Oracle | None) -> Oracle:
    if answers is None:
        return classifier
    return lambda x_BCHW: answers(x_BCHW).to(x_BCHW)
