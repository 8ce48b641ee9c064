"""Named randomness: every generator derives from the seed and the role that it plays.

A result must not depend on the engine, the number of processes or what ran before, so nothing draws from a
global generator: `generator(seed, "batches", round, client)` is the same stream wherever it is asked for.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, *role: str | int) -> int:
    """Returns a 63-bit seed for a role, such as `("noise", round, client)`.

    Two roles share it with probability 2^-63: of a million roles any two do with less than one in ten million.
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in role)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *role: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a torch generator for a role; for draws that may coincide.

    On the CPU torch uses the lower 32 bits of a seed. Two roles share a stream with probability 2^-32: of 240 000
    roles about 7 pairs do. What privacy rests on comes from `numpy_generator`.
    """
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *role))


def numpy_generator(seed: int, *role: str | int) -> np.random.Generator:
    """Returns a numpy generator for a role; it uses all of the seed."""
    return np.random.default_rng(derive_seed(seed, *role))


@contextmanager
def global_seed(seed: int, *role: str | int) -> Iterator[None]:
    """Seeds torch's global generators within the block and puts them back.

    For what takes no generator: a module's initialisation and dropout.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, *role))
        yield
