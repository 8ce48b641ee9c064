"""Where the randomness that privacy rests on comes from: a seed, for research, or the operating system, for patients.

`seeded_noise` can be repeated, and taken away by whoever knows the seed. `system_noise` draws from the operating
system's cryptographic source, and its result is a rounding of what the Gaussian mechanism on real numbers would give:

1. The sum is rounded to a lattice, whose step h is a power of two, from 2^-41 to 2^-40 standard deviations.
2. floor(X / h) steps of the lattice are added, with X exactly Gaussian (`rounded_gaussian`). The result is the rounded
   sum plus X, rounded down: a function of what the ideal mechanism releases. So whatever an accountant proves of the
   Gaussian mechanism, with whatever sampling, holds for it as it stands; nothing is owed for the noise being discrete.
3. Only then it becomes a floating-point number, which is post-processing.

Two things separate this from the ideal. Rounding P numbers first may move two neighbouring sums apart by h sqrt(P); the
standard deviation is therefore enlarged by a factor of 1 + sqrt(P) 2^-27, which makes up for it at any noise multiplier
up to 8000 and any P up to 2^40, and is 1.0000024 for 100 000 numbers. And the law of each number is within 1e-50 of
the stated one in total variation, so that 10^20 numbers add at most (1 + e^epsilon) 1e-30 to delta.

Not covered: that the sum itself was added up in floating point (what a record can move it by is the clipping's matter),
and how long a step takes. The drawing never looks at the sum, though, and how many proposals it rejects says nothing
of the numbers that it keeps.
"""

import math
import os
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trilemma.privacy.rounded_gaussian import CELLS, CHUNK, rounded_gaussian

#: "seeded" can be repeated, "system" cannot.
NoiseKind = Literal["seeded", "system"]

#: (sum_P, standard deviation) -> the sum with its own Gaussian noise on each number; same shape, type and device.
AddNoise = Callable[[Tensor, float], Tensor]

#: There are at least 2^40 steps of the lattice to a standard deviation.
LATTICE_BITS = 40

#: Sums beyond this many steps, a million standard deviations and more, count as this many.
_MAX_STEPS = 2.0**61


def noise_source_in_words(kind: NoiseKind) -> str:
    """Returns what a guarantee says of its noise."""
    if kind == "seeded":
        return "seeded noise, for research only: whoever knows the seed can take it away"
    return (
        "noise from the operating system's cryptographic source, exactly Gaussian and rounded to a lattice, "
        "so that its lowest bits tell nothing"
    )


def seeded_noise(generator: np.random.Generator) -> AddNoise:
    """Returns noise from a generator, the same numbers on every device; for research only.

    It is numpy's, because torch's on the CPU uses 32 bits of its seed: two noises of a large study would be equal.
    """

    def add(sum_P: Tensor, standard_deviation: float) -> Tensor:
        noise_P = torch.from_numpy(generator.standard_normal(tuple(sum_P.shape), np.float32)).to(sum_P.device)
        return sum_P + noise_P * standard_deviation

    return add


def system_noise() -> AddNoise:
    """Returns noise from the operating system, safe against attacks on its lowest bits; see the module's text.

    It takes sums of any floating type. A number that is none counts as 0, an infinite one as the largest that there
    is: both may be said of any sum without moving two of them further apart. A standard deviation that is not positive
    and finite raises ValueError.
    """

    def add(sum_P: Tensor, standard_deviation: float) -> Tensor:
        exponent, width = _lattice(sum_P.numel(), standard_deviation)
        flat_P = sum_P.detach().cpu().flatten()
        noised_P = torch.empty_like(flat_P)
        for start in range(0, len(flat_P), CHUNK):
            part = slice(start, start + CHUNK)
            noised_P[part] = torch.from_numpy(_noised(flat_P[part].double().numpy(), exponent, width))
        return noised_P.reshape(sum_P.shape).to(sum_P.device)

    return add


def poisson_sample(num: int, rate: float, generator: np.random.Generator | None) -> Tensor:
    """Returns the positions, ascending, of those of `num` units that join a step, each independently.

    Args:
        num: How many there are.
        rate: Probability of each, in [0, 1].
        generator: For research; its numbers have 53 bits, so that the rate may be exceeded by 2^-53. None asks the
            operating system, whose rate is at most 2^-64 below `rate` and never above.

    Raises:
        ValueError: If `rate` is no probability.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"the sampling rate {rate} is no probability")
    if generator is not None:
        return torch.from_numpy(np.flatnonzero(generator.random(num) < rate))
    if rate == 1:
        return torch.arange(num)
    word_N = np.frombuffer(os.urandom(8 * num), np.uint64)
    return torch.from_numpy(np.flatnonzero(word_N < np.uint64(int(math.ldexp(rate, 64)))))


def _lattice(num: int, standard_deviation: float) -> tuple[int, int]:
    """Returns log2 of the lattice's step, and how many steps make 1 / CELLS of the enlarged standard deviation."""
    enlarged = standard_deviation * (1 + math.sqrt(num) * 2.0**-27)
    if not 0 < enlarged < math.inf:
        raise ValueError(f"noise needs a positive and finite standard deviation, not {standard_deviation}")
    exponent = math.frexp(enlarged)[1] - 1 - LATTICE_BITS
    return exponent, math.ceil(math.ldexp(enlarged, -exponent) / CELLS)


def _noised(sum_P: np.ndarray, exponent: int, width: int) -> np.ndarray:
    """Returns rounded sum plus noise, all on the lattice, in double precision."""
    with np.errstate(over="ignore"):  # what overflows is cut to the limit next
        steps_P = np.nan_to_num(np.ldexp(sum_P, -exponent), nan=0.0, posinf=_MAX_STEPS, neginf=-_MAX_STEPS)
        noised_P = np.rint(steps_P).clip(-_MAX_STEPS, _MAX_STEPS).astype(np.int64) + rounded_gaussian(len(sum_P), width)
        return np.ldexp(noised_P.astype(np.float64), exponent)
