"""Trainings of seconds: few small images, a small network, everything else as in earnest."""

from typing import Any

import torch

from helpers.small_problem import stripes
from trilemma.data.records import Dataset
from trilemma.federation.round import Federation, run_round
from trilemma.federation.specs import TrainSpec
from trilemma.federation.state import TrainingState
from trilemma.federation.training import initial_state, prepare

CPU = torch.device("cpu")
DP = {"kind": "dp_sgd", "noise_multiplier": 1.0, "delta": 1e-3, "clip": 1.0}


def tiny_spec(**changes: Any) -> TrainSpec:
    """Three clients, one step of 16 records of a 4 wide ResNet-9 per round, two rounds, unless changed."""
    fields = {
        "data": {"kind": "phantom"},
        "partition": {"kind": "iid", "num_clients": 3},
        "model": {"kind": "resnet9", "width": 4},
        "local": {"batch_size": 16, "steps": 1},
        "rounds": 2,
    }
    return TrainSpec.model_validate({**fields, **changes})


def tiny_dataset(num_images: int = 96, *, num_classes: int = 3, size: int = 8) -> Dataset:
    train, val, test = (
        stripes(num, num_classes=num_classes, size=size, seed=seed)
        for seed, num in enumerate((num_images, num_images // 3, num_images // 3))
    )
    classes = ("flat", "lying", "upright")[:num_classes]
    return Dataset("stripes", classes, ("everywhere",), train, val, test, True, "drawn here", "f0")


def tiny_federation(dataset: Dataset | None = None, **changes: Any) -> Federation:
    return prepare(tiny_spec(**changes), dataset or tiny_dataset(), CPU)


def trained_state(federation: Federation, rounds: int | None = None, state: TrainingState | None = None):
    state = state or initial_state(federation)
    while state.round < (rounds or federation.spec.rounds):
        state = run_round(federation, state)
    return state


def equal_states(one: TrainingState, other: TrainingState) -> bool:
    """Whether two states are the same bit for bit, all but the seconds that they took."""
    (tensors, texts), (others, other_texts) = one.pack(), other.pack()
    same = tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    rows = [[{**row, "seconds": 0} for row in state.history] for state in (one, other)]
    return same and rows[0] == rows[1] and texts["private_steps"] == other_texts["private_steps"]
