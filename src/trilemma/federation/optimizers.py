"""Optimizers as pure functions on flat parameter vectors, for clients and for the server alike.

A step takes a state and returns the next one; a state is a dict of tensors, so that it can be stored as it is.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]


class Optimizer(NamedTuple):
    """An optimizer closed over its numbers.

    Attributes:
        init: params_P -> state.
        step: (params_P, gradient_P, state, learning_rate) -> (params_P, state).
    """

    init: Callable[[Tensor], State]
    step: Callable[[Tensor, Tensor, State, float], tuple[Tensor, State]]


def sgd(momentum: float = 0.0, weight_decay: float = 0.0) -> Optimizer:
    """Returns SGD with heavy-ball momentum: v <- m v + g; p <- p - lr v, as PyTorch and FedAvgM have it."""

    def init(params_P: Tensor) -> State:
        return {"velocity": torch.zeros_like(params_P)} if momentum else {}

    def step(params_P: Tensor, gradient_P: Tensor, state: State, learning_rate: float) -> tuple[Tensor, State]:
        if weight_decay:
            gradient_P = gradient_P + weight_decay * params_P
        if momentum:
            gradient_P = momentum * state["velocity"] + gradient_P
            state = {"velocity": gradient_P}
        return params_P - learning_rate * gradient_P, state

    return Optimizer(init, step)


def adam(
    beta1: float = 0.9, beta2: float = 0.999, stability: float = 1e-8, weight_decay: float = 0.0, debias: bool = True
) -> Optimizer:
    """Returns Adam (Kingma and Ba 2015) with decoupled weight decay.

    Args:
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        stability: Added to the root of the second moment; FedAdam calls it tau and sets it near 1e-3.
        weight_decay: Decoupled (AdamW).
        debias: Correct the moments for their zero start; FedAdam (Reddi et al. 2021, Algorithm 2) does not and
            starts the second moment at tau^2.
    """

    def init(params_P: Tensor) -> State:
        second = torch.full_like(params_P, 0.0 if debias else stability**2)
        return {"first": torch.zeros_like(params_P), "second": second, "count": torch.zeros((), dtype=torch.int64)}

    def step(params_P: Tensor, gradient_P: Tensor, state: State, learning_rate: float) -> tuple[Tensor, State]:
        count = state["count"] + 1
        first = beta1 * state["first"] + (1 - beta1) * gradient_P
        second = beta2 * state["second"] + (1 - beta2) * gradient_P.square()
        n = int(count)
        first_hat = first / (1 - beta1**n) if debias else first
        second_hat = second / (1 - beta2**n) if debias else second
        moved_P = params_P * (1 - learning_rate * weight_decay) if weight_decay else params_P
        moved_P = moved_P - learning_rate * first_hat / (second_hat.sqrt() + stability)
        return moved_P, {"first": first, "second": second, "count": count}

    return Optimizer(init, step)
