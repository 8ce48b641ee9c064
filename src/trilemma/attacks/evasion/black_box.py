"""What black-box attacks share: a model that is asked and shows nothing else, and draws of their own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trilemma.attacks.evasion.frozen import frozen
from trilemma.attacks.evasion.types import Oracle
from trilemma.models.classifier import Classifier
from trilemma.randomness import generator as derived_generator


@contextmanager
def asking(classifier: Classifier, answers: Oracle | None) -> Iterator[Oracle]:
    """Gives what a black-box attack asks: images (M, C, H, W) -> logits (M, K) on the images' device.

    That is the model that ships, or, without one, the classifier in evaluation mode, which is left as it was found.
    Within the block no gradient is recorded.
    """
    with torch.no_grad():
        if answers is None:
            with frozen(classifier):
                yield classifier
        else:
            yield _answers_near_the_images(answers)


def own_draws(generator: torch.Generator, attack: str) -> torch.Generator:
    """Returns a generator for one attack, by one draw from the given one.

    A black-box attack ends as soon as no image is left. With a generator of its own it may, for whatever draws from
    the given one afterwards, and so no other image's result, depends on when that was.
    """
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return derived_generator(int(seed), attack, device=generator.device)


def _answers_near_the_images(answers: Oracle) -> Oracle:
    def near(x_BCHW: Tensor) -> Tensor:
        return answers(x_BCHW).to(x_BCHW.device)

    return near
