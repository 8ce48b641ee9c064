"""Gaussian numbers rounded down to whole numbers, from the operating system's randomness and without rounding errors.

Floating-point samplers reach some numbers and miss others, and their gaps show in the lowest bits of whatever they are
added to (Mironov 2012; Holohan and Braghin 2021; Haney et al. 2022). Here every choice is one of whole numbers, or a
comparison that floating point decides only where its error cannot matter.

The method is rejection from a staircase. The half line is cut into `CELLS` cells to a standard deviation. A cell j is
drawn by Walker's alias method with whole weights, then a place in it, and kept with probability

    scale / weight_j * exp(-(j + place)^2 / (2 CELLS^2)),

whose numerator is the Gaussian density, so that what is kept is exactly Gaussian whatever the weights are, provided
that no probability exceeds 1. The place is a real number: a whole one of `width` steps and a remainder, drawn only when
it matters. About 1 proposal in 160 is rejected. How many are does not depend on the numbers that are kept.
"""

import os
from decimal import ROUND_CEILING, Context, Decimal, localcontext
from functools import lru_cache
from typing import NamedTuple

import numpy as np

#: Cells to a standard deviation, and standard deviations to the end of the staircase: 2 Phi(-16) < 1e-56 lies beyond.
CELLS, REACH = 64, 16

#: Largest width of a cell in whole numbers: keeps the rejections that make places equally likely below 2^-12.
MAX_WIDTH = 1 << 35

#: Numbers proposed at once at most: the workspace stays in the processor's cache.
CHUNK = 1 << 16

_COLUMNS = CELLS * REACH  # a power of two
_COLUMN_BITS = 64 - (_COLUMNS.bit_length() - 1)
_PLACE_BITS = 47

#: Closer to its threshold than this, a comparison is left to exact arithmetic. In single precision both sides together
#: are wrong by less than 2^-20, and 2^-17 is half a step of the 16 bits that are compared.
_MARGIN = 2.0**-16

_EXACT = Context(prec=80)


class _Staircase(NamedTuple):
    """The proposal over cells.

    Attributes:
        keep_J: A column's own cell is meant below this, its alias from there on, out of 2^54.
        alias_J: The other cell of a column.
        weights: Whole weights of the cells, 2^64 together.
        scale: What a density of 1 weighs; a cell weighs at least `scale` times the density at its inner edge.
        height_J: `scale` times that density over the weight: the largest probability to keep a number of the cell.
    """

    keep_J: np.ndarray
    alias_J: np.ndarray
    weights: tuple[int, ...]
    scale: Decimal
    height_J: np.ndarray


def rounded_gaussian(num: int, width: int) -> np.ndarray:
    """Returns `num` independent draws of floor(X), X normal with mean 0 and standard deviation `CELLS * width`, int64.

    A draw's total variation distance from that law is below 1e-50: the end of the staircase (1e-56), and the 80 digits
    and 192 bits of the exact comparison.

    Args:
        num: How many.
        width: From 1 to `MAX_WIDTH`.

    Raises:
        ValueError: If `width` is out of range.
    """
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"the width of a cell, {width}, is not from 1 to {MAX_WIDTH}")
    drawn_N = np.empty(num, np.int64)
    filled = 0
    while filled < num:
        missing = num - filled
        kept = _kept(min(CHUNK, missing + missing // 64 + 16), width)[:missing]
        drawn_N[filled : filled + len(kept)] = kept
        filled += len(kept)
    return drawn_N


def _kept(num: int, width: int) -> np.ndarray:
    """Returns those of `num` proposals that are kept, int64."""
    stairs = _staircase()
    # One word for the cell; in the other a bit for the sign, 47 for the place and 16 to compare with.
    cell_word_N, word_N = np.frombuffer(os.urandom(16 * num), np.uint64).reshape(2, num)
    column_N = (cell_word_N >> np.uint64(_COLUMN_BITS)).astype(np.intp)
    own_N = (cell_word_N & np.uint64((1 << _COLUMN_BITS) - 1)) < stairs.keep_J[column_N]
    cell_N = np.where(own_N, column_N, stairs.alias_J[column_N])
    place_word_N = (word_N >> np.uint64(1)) & np.uint64((1 << _PLACE_BITS) - 1)
    place_N = (place_word_N % np.uint64(width)).astype(np.int64)

    to_compare_N = word_N >> np.uint64(64 - 16)
    lead_N = _lead(cell_N, place_N, width, to_compare_N)
    keep_N = lead_N > 0
    margin = _margin(width)
    for n in np.flatnonzero(np.abs(lead_N) <= margin):
        keep_N[n] = _keeps_exactly(int(cell_N[n]), int(place_N[n]), width, int(to_compare_N[n]))
    # Only whole multiples of the width are equally likely to give each place.
    keep_N &= place_word_N < np.uint64((1 << _PLACE_BITS) // width * width)
    # floor(-(k + remainder)) is -k - 1, which is what flipping every bit of k makes.
    return ((cell_N * width + place_N) ^ -(word_N & np.uint64(1)).astype(np.int64))[keep_N]


def _lead(cell_N: np.ndarray, place_N: np.ndarray, width: int, to_compare_N: np.ndarray) -> np.ndarray:
    """Returns the probability to keep a number less what it is compared with, in single precision."""
    place_in_cell_N = place_N.astype(np.float32) / np.float32(width)
    squared_N = place_in_cell_N * (2 * cell_N.astype(np.float32) + place_in_cell_N)
    probability_N = _staircase().height_J[cell_N] * np.exp(squared_N * np.float32(-0.5 / CELLS**2))
    return probability_N - (to_compare_N.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-16)


def _margin(width: int) -> float:
    """Returns how far a lead may be from the exact one: `_MARGIN`, and what the place's unknown remainder does.

    A remainder moves the probability by its slope at most, which is below REACH / CELLS + 1 / CELLS^2.
    """
    return _MARGIN + (REACH / CELLS + CELLS**-2) / width


def _keeps_exactly(cell: int, place: int, width: int, to_compare: int) -> bool:
    """Decides one comparison with 192 more bits on either side: a remainder of the place, and of `to_compare`."""
    stairs = _staircase()
    remainder, further = int.from_bytes(os.urandom(24), "big"), int.from_bytes(os.urandom(24), "big")
    with localcontext(_EXACT):
        distance = cell + (place + Decimal(remainder) / (1 << 192)) / width
        probability = stairs.scale * (-distance * distance / (2 * CELLS**2)).exp() / stairs.weights[cell]
        return Decimal((to_compare << 192) + further) / (1 << 208) < probability


@lru_cache(maxsize=1)
def _staircase() -> _Staircase:
    with localcontext(_EXACT):
        densities = [(-Decimal(j * j) / (2 * CELLS**2)).exp() for j in range(_COLUMNS)]
        scale = ((1 << 64) - _COLUMNS) / sum(densities, Decimal(0))
        weights = [int((scale * density).to_integral_value(ROUND_CEILING)) for density in densities]
        weights[0] += (1 << 64) - sum(weights)
        heights = [float(scale * density / weight) for density, weight in zip(densities, weights, strict=True)]
    keep, alias = _alias_table(weights)
    keep_J, alias_J = np.array(keep, np.uint64), np.array(alias, np.intp)
    return _Staircase(keep_J, alias_J, tuple(weights), scale, np.array(heights, np.float32))


def _alias_table(weights: list[int]) -> tuple[list[int], list[int]]:
    """Returns what each column keeps for its own cell, and the cell that has its rest (Walker 1977, Vose 1991)."""
    column = 1 << _COLUMN_BITS
    left, alias = list(weights), list(range(len(weights)))
    small = [j for j, weight in enumerate(left) if weight < column]
    large = [j for j, weight in enumerate(left) if weight >= column]
    keep = [column] * len(weights)
    while small:
        poor, rich = small.pop(), large[-1]
        keep[poor], alias[poor] = left[poor], rich
        left[rich] -= column - left[poor]
        if left[rich] < column:
            small.append(large.pop())
    return keep, alias
