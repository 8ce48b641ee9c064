"""Which random streams a private training draws from: its own, so that no two releases share what protects them.

Noise, Poisson samples, augmentation, random starts and dropout of a private training are keyed by the training and by
the images. If two releases shared their noise, the difference of the two models would be free of it.
"""

import os

import numpy as np

from trilemma.federation.clients import Client
from trilemma.federation.specs import TrainSpec
from trilemma.federation.teaching import phase_name
from trilemma.randomness import numpy_generator


def private_generator(
    spec: TrainSpec, fingerprint: str, role: str, round_index: int, *who: str | int
) -> np.random.Generator:
    """Returns the seeded stream of a draw that privacy rests on: noise, or who is sampled.

    Args:
        spec: The training; equal ones on equal images draw the same.
        fingerprint: Of the data set.
        role: "noise" or "poisson".
        round_index: From 0.
        who: Draws.
    """
    return numpy_generator(spec.seed, role, spec.key, fingerprint, round_index, *who)


def client_stream(spec: TrainSpec, client: Client, role: str, round_index: int) -> tuple[int, *tuple[str | int, ...]]:
    """Returns seed and role of a client's augmentation, defence or dropout in a round, for `trilemma.randomness`.

    Such draws are handed out by position in the batch, so one record less shifts those of all that follow. What a
    record may change is bounded by the clip only where it is as likely to meet any other draws, fresh ones: with noise
    from the operating system the seed comes from there too, anew at every call, and is forgotten.
    """
    if client.plan is None:
        return spec.seed, role, *phase_name(spec), round_index, client.number
    if client.plan.noise == "system":
        return int.from_bytes(os.urandom(32), "big"), role
    return spec.seed, role, spec.key, client.fingerprint, round_index, client.number
