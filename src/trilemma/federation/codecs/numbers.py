"""How the numbers of an update are written: each kind is a pair of functions between K floats and bytes.

What is no number stays none, so that the server can see it and refuse the update.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

#: float32: as they are. float16: half of that. int8, int4: levels of a scale for each block, drawn between the two
#: nearest so that they are right on average. sign: one bit for each, and the mean magnitude of each block.
Numbers = Literal["float32", "float16", "int8", "int4", "sign"]

#: Numbers that share a scale.
BLOCK = 1024
#: Largest level on each side of zero.
LEVELS = {"int8": 127, "int4": 7}
#: Largest float16.
LARGEST_HALF = 65504.0

_FLOATS = {"float32": "<f4", "float16": "<f2"}
#: Bits of a number; the scales of blocks come on top.
BITS = {"float32": 32, "float16": 16, "int8": 8, "int4": 4, "sign": 1}


def write_numbers(values_K: Tensor, kind: Numbers, draws: torch.Generator) -> bytes:
    """Returns the numbers as bytes, of which there are `num_bytes`.

    Args:
        values_K: float32 on a CPU.
        kind: How they are written.
        draws: Source of the random rounding; on a CPU.

    References: stochastic levels are QSGD's with the largest magnitude as the scale (Alistarh et al. 2017, section
    3.1); signs with their scale are those of Karimireddy et al. (2019), Algorithm 1.
    """
    if kind in _FLOATS:
        fits_K = values_K.clamp(-LARGEST_HALF, LARGEST_HALF)
        kept_K = values_K if kind == "float32" else torch.where(values_K.isfinite(), fits_K, values_K)
        return kept_K.numpy().astype(_FLOATS[kind]).tobytes()
    blocks_NB = _in_blocks(values_K)
    if kind == "sign":
        counts_N = _lengths(len(values_K))
        scales_N = blocks_NB.abs().sum(1) / counts_N
        bits_K = (values_K >= 0).numpy()
        return scales_N.numpy().astype("<f4").tobytes() + np.packbits(bits_K, bitorder="little").tobytes()
    scales_N = blocks_NB.abs().amax(1) / LEVELS[kind]  # of a block with a number that is none it is none either
    steps_NB = blocks_NB / torch.where(scales_N > 0, scales_N, 1.0)[:, None]
    low_NB = steps_NB.floor()
    up_NB = torch.rand(low_NB.shape, generator=draws) < steps_NB - low_NB
    most = LEVELS[kind]  # which the quotient's rounding may exceed
    levels_K = (
        (low_NB + up_NB).clamp(-most, most).nan_to_num(0.0, 0.0, 0.0).flatten()[: len(values_K)].to(torch.int8).numpy()
    )
    return scales_N.numpy().astype("<f4").tobytes() + (_paired(levels_K) if kind == "int4" else levels_K.tobytes())


def read_numbers(payload: bytes, kind: Numbers, count: int) -> Tensor:
    """Returns the numbers of some bytes, float32 (K,).

    Args:
        payload: What `write_numbers` made.
        kind: How they are written.
        count: K.

    Raises:
        ValueError: If that many numbers are not so many bytes.
    """
    if len(payload) != num_bytes(kind, count):
        raise ValueError(f"{count} numbers as {kind} are {num_bytes(kind, count)} bytes and not {len(payload)}")
    if kind in _FLOATS:
        return torch.from_numpy(np.frombuffer(payload, _FLOATS[kind]).astype(np.float32))
    num_blocks = -(-count // BLOCK)
    scales_N = torch.from_numpy(np.frombuffer(payload, "<f4", num_blocks).astype(np.float32))
    body = np.frombuffer(payload, np.uint8, offset=4 * num_blocks)
    if kind == "sign":
        steps = np.unpackbits(body, count=count, bitorder="little").astype(np.float32) * 2 - 1
    else:
        steps = (_unpaired(body, count) if kind == "int4" else body.view(np.int8)).astype(np.float32)
    return torch.from_numpy(steps) * scales_N.repeat_interleave(BLOCK)[:count]


def num_bytes(kind: Numbers, count: int) -> int:
    """Returns how many bytes so many numbers are."""
    scales = 0 if kind in _FLOATS else 4 * -(-count // BLOCK)
    return scales + -(-count * BITS[kind] // 8)


def _in_blocks(values_K: Tensor) -> Tensor:
    missing = -len(values_K) % BLOCK
    return torch.nn.functional.pad(values_K, (0, missing)).reshape(-1, BLOCK)


def _lengths(count: int) -> Tensor:
    """Returns how many numbers each block holds."""
    lengths_N = torch.full((-(-count // BLOCK),), float(BLOCK))
    if count % BLOCK:
        lengths_N[-1] = count % BLOCK
    return lengths_N


def _paired(levels_K: np.ndarray) -> bytes:
    """Returns levels from -7 to 7, two in a byte."""
    nibbles = np.zeros(len(levels_K) + len(levels_K) % 2, np.uint8)
    nibbles[: len(levels_K)] = levels_K + 8
    return (nibbles[::2] | nibbles[1::2] << 4).tobytes()


def _unpaired(body: np.ndarray, count: int) -> np.ndarray:
    nibbles = np.stack([body & 15, body >> 4], axis=1).reshape(-1)[:count]
    return nibbles.astype(np.int8) - 8
