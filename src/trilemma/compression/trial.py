"""Tries a model that ships against the artefact that it was made from, before anybody gets it."""

from typing import NamedTuple

import numpy as np
import torch

from trilemma.compression.session import Session, ShippedSession
from trilemma.data.images import resized
from trilemma.errors import Failure
from trilemma.randomness import numpy_generator

#: Largest difference of a logit, over the larger of 1 and the largest logit, that is taken for the same answer.
SAME = 1e-6

_IMAGES_PER_SIZE = 4
_MOST_PIXELS = 4_000_000
_REMEDY = "Export it with the versions of onnx and onnxruntime that constraints.txt names, or report this"


class Agreement(NamedTuple):
    """How far a shipped model's answers are from those of the loader and the artefact, on synthetic images.

    Attributes:
        sizes: Height and width of the images, none of them the model's own; of each some noise and some blocks.
        num_images: Images of all sizes together.
        largest: Largest difference of a probability.
        own_size: Largest difference of a logit on images of the model's own size; 0 up to rounding, see `SAME`.
    """

    sizes: tuple[tuple[int, int], ...]
    num_images: int
    largest: float
    own_size: float


def tried(artefact: bytes, shipped: bytes) -> Agreement:
    """Returns how far two files agree, the first behind the loader and the second alone.

    Args:
        artefact: What was measured.
        shipped: What `ship_onnx` made of it.

    Raises:
        Failure: If the shipped file cannot be run, its answers to a grey image of whatever size are not those of the
            artefact, or those to images of the model's own size.
    """
    first, second = Session(artefact), ShippedSession(shipped)
    channels, size, _ = first.image_shape
    for height, width in ((size, size), (2 * size + 1, 3 * size)):
        # Two at once: a network that computes with the batch size as a number is found here.
        grey = np.full((2, height, width) if channels == 1 else (2, height, width, 1), 128, np.uint8)
        _difference(first, second, grey, "a grey image")
    own = _difference(first, second, _pictures(channels, size, size), "images of its own size")
    wanted = ((size // 2 + 1, size), (2 * size + 3, 3 * size + 1), (5 * size, 4 * size))
    sizes = wanted[:1] + tuple(each for each in wanted[1:] if each[0] * each[1] <= _MOST_PIXELS)
    largest = 0.0
    for height, width in sizes:
        images = _pictures(channels, height, width)
        expected = torch.from_numpy(_by_loader(first, images)).softmax(1).numpy()
        largest = max(largest, float(np.abs(second.answers(images)[1] - expected).max()))
    return Agreement(sizes, _IMAGES_PER_SIZE * len(sizes), largest, own)


def _difference(first: Session, second: ShippedSession, images: np.ndarray, what: str) -> float:
    """Returns the largest difference of a logit, which must be none."""
    expected, (found, probabilities) = _by_loader(first, images), second.answers(images)
    if not (np.isfinite(expected).all() and np.isfinite(found).all() and np.isfinite(probabilities).all()):
        raise Failure("model file", f"its answer to {what} is not finite", "Choose another artefact")
    difference = float(np.abs(found - expected).max())
    if difference > SAME * max(1.0, float(np.abs(expected).max())) or np.abs(probabilities.sum(1) - 1).max() > 1e-5:
        problem = f"with its preprocessing inside it answers {what} otherwise than the artefact (by {difference:.3g})"
        raise Failure("model file", problem, _REMEDY)
    return difference


def _by_loader(session: Session, images: np.ndarray) -> np.ndarray:
    """Returns the artefact's logits (N, K) on decoded files after what the loader of image files does to them."""
    channels, size, _ = session.image_shape
    if images.ndim == 4 and images.shape[3] == 1:
        images = np.repeat(images, 3, axis=3)
    x_NCHW = np.stack([resized(image, size) for image in images])
    assert x_NCHW.shape[1] == channels
    return session.predict(torch.from_numpy(x_NCHW).to(torch.float32).div_(255.0)).numpy()


def _pictures(channels: int, height: int, width: int) -> np.ndarray:
    """Returns noise, which shows every rounding, and blocks of eight pixels, which are more like pictures."""
    draws = numpy_generator(0, "trial", height, width)
    planes = [] if channels == 1 else [3]
    half = _IMAGES_PER_SIZE // 2
    noise = draws.integers(0, 256, (half, height, width, *planes), np.uint8)
    coarse = draws.integers(0, 256, (half, -(-height // 8), -(-width // 8), *planes), np.uint8)
    blocks = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    return np.concatenate([noise, blocks])
