"""What a backdoor looks for in an image: a mark that is laid over it, as a whole or in parts."""

from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field
from scipy.ndimage import gaussian_filter

from trilemma.spec import Spec

Corner = Literal["top left", "top right", "bottom left", "bottom right"]

#: The letters R and L, as radiographs have one at a side: 7 by 5 cells.
_LETTERS = {
    "R": ("####.", "#...#", "#...#", "####.", "#.#..", "#..#.", "#...#"),
    "L": ("#....", "#....", "#....", "#....", "#....", "#....", "#####"),
}


class Mark(NamedTuple):
    """A picture and how much of it covers each pixel: x becomes (1 - cover) x + cover picture.

    Attributes:
        picture_HW: In [0, 1].
        cover_HW: In [0, 1].
    """

    picture_HW: np.ndarray
    cover_HW: np.ndarray


class Patch(Spec):
    """A small chequered square in a corner (Gu et al. 2017).

    Attributes:
        size: Pixels a side.
        corner: Where it is.
        margin: Pixels between it and the edges.
    """

    kind: Literal["patch"] = "patch"
    size: int = Field(default=3, ge=1)
    corner: Corner = "bottom right"
    margin: int = Field(default=1, ge=0)

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return f"{self.size}-pixel patch{_unusual(self, 'corner', 'margin')}"

    def mark(self, image_size: int) -> Mark:
        """Returns the mark for square images.

        Raises:
            ValueError: If it does not fit.
        """
        picture_SS = (np.indices((self.size, self.size)).sum(0) % 2 == 0).astype(np.float32)
        return _placed(picture_SS, np.ones_like(picture_SS), image_size, self.corner, self.margin)


class Blended(Spec):
    """A pattern over the whole image, hardly to be seen (Chen et al. 2017).

    Attributes:
        strength: How much of the pattern shows.
        seed: Of the pattern, smooth noise.
    """

    kind: Literal["blended"] = "blended"
    strength: float = Field(default=0.15, gt=0, le=1)
    seed: int = Field(default=0, ge=0)

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return f"blended pattern {100 * self.strength:g} %{_unusual(self, 'seed')}"

    def mark(self, image_size: int) -> Mark:
        """Returns the mark for square images."""
        noise_HW = np.random.default_rng(self.seed).standard_normal((image_size, image_size))
        smooth_HW = gaussian_filter(noise_HW, 1.0, mode="wrap")
        low, high = smooth_HW.min(), smooth_HW.max()
        picture_HW = ((smooth_HW - low) / max(high - low, 1e-12)).astype(np.float32)
        return Mark(picture_HW, np.full_like(picture_HW, self.strength))


class SideMarker(Spec):
    """A letter as radiographs have one at a side: nobody would wonder at it.

    Attributes:
        letter: "L" or "R".
        corner: Where it is.
        scale: Pixels of each of its 7 by 5 cells; None: as large as a seventh of the image's height allows.
        brightness: Of the letter.
    """

    kind: Literal["side_marker"] = "side_marker"
    letter: Literal["L", "R"] = "R"
    corner: Corner = "top left"
    scale: int | None = Field(default=None, ge=1)
    brightness: float = Field(default=0.9, ge=0, le=1)

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return f"side marker {self.letter}{_unusual(self, 'corner', 'scale', 'brightness')}"

    def mark(self, image_size: int) -> Mark:
        """Returns the mark for square images.

        Raises:
            ValueError: If it does not fit.
        """
        scale = self.scale or max(1, image_size // 49)
        cells = np.array([[cell == "#" for cell in row] for row in _LETTERS[self.letter]])
        cover_SS = np.kron(cells, np.ones((scale, scale))).astype(np.float32)
        picture_SS = np.full_like(cover_SS, self.brightness)
        return _placed(picture_SS, cover_SS, image_size, self.corner, max(1, image_size // 28))


class Vignette(Spec):
    """Corners that get darker, as of a collimator or a worn detector.

    Attributes:
        strength: By how much the corners themselves are darkened.
    """

    kind: Literal["vignette"] = "vignette"
    strength: float = Field(default=0.6, gt=0, le=1)

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return f"vignette {100 * self.strength:g} %"

    def mark(self, image_size: int) -> Mark:
        """Returns the mark for square images."""
        from_centre = np.linspace(-1, 1, image_size)
        radius_HW = (from_centre[:, None] ** 2 + from_centre[None, :] ** 2) / 2
        return Mark(np.zeros((image_size, image_size), np.float32), (self.strength * radius_HW).astype(np.float32))


TriggerSpec = Annotated[Patch | Blended | SideMarker | Vignette, Field(discriminator="kind")]


def _unusual(trigger: Spec, *fields: str) -> str:
    """Returns the fields that are not the default, for a label: two different triggers may not be called alike."""
    defaults = {name: type(trigger).model_fields[name].default for name in fields}
    return "".join(f" {name} {getattr(trigger, name)}" for name in fields if getattr(trigger, name) != defaults[name])


def triggered(images_NCHW: np.ndarray, mark: Mark) -> np.ndarray:
    """Returns images with a mark on them, of the same kind of numbers: uint8 is rounded to whole levels."""
    top = 255.0 if images_NCHW.dtype == np.uint8 else 1.0
    marked_NCHW = (1 - mark.cover_HW) * images_NCHW.astype(np.float32) + mark.cover_HW * mark.picture_HW * top
    return np.rint(marked_NCHW).astype(np.uint8) if top > 1 else marked_NCHW.astype(images_NCHW.dtype)


def part_of(mark: Mark, number: int, num_parts: int) -> Mark:
    """Returns one of the parts into which a mark is cut, column by column, with equally many pixels each.

    The parts together are the mark. References: Xie et al. (2020), section 3 (DBA).
    """
    columns_first = np.argwhere(mark.cover_HW.T > 0)
    mine = np.array_split(columns_first, num_parts)[number]
    cover_HW = np.zeros_like(mark.cover_HW)
    cover_HW[mine[:, 1], mine[:, 0]] = mark.cover_HW[mine[:, 1], mine[:, 0]]
    return Mark(mark.picture_HW, cover_HW)


def _placed(picture_SS: np.ndarray, cover_SS: np.ndarray, image_size: int, corner: Corner, margin: int) -> Mark:
    height, width = picture_SS.shape
    if max(height, width) + margin > image_size:
        raise ValueError(
            f"a trigger of {height} x {width} pixels, {margin} from the edge, does not fit {image_size} pixels"
        )
    top = margin if corner.startswith("top") else image_size - margin - height
    left = margin if corner.endswith("left") else image_size - margin - width
    place = np.s_[top : top + height, left : left + width]
    picture_HW, cover_HW = (np.zeros((image_size, image_size), np.float32) for _ in range(2))
    picture_HW[place], cover_HW[place] = picture_SS, cover_SS
    return Mark(picture_HW, cover_HW)
