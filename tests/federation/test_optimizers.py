"""The pure optimizers against PyTorch's own, and FedAdam against its paper."""

import math

import pytest
import torch

from trilemma.federation.optimizers import adam, sgd
from trilemma.federation.specs import Local, ServerAdam, ServerSgd

STEPS, SIZE = 20, 7


def gradients(params_P, step):
    """A gradient that depends on the place, so that an error early on grows."""
    wave = torch.sin(torch.arange(SIZE, dtype=torch.float32) + step)
    return 0.3 * params_P + wave


def run(optimizer, learning_rate):
    params_P = torch.linspace(-1, 1, SIZE)
    state = optimizer.init(params_P)
    for step in range(STEPS):
        params_P, state = optimizer.step(params_P, gradients(params_P, step), state, learning_rate)
    return params_P


def run_torch(make):
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, SIZE))
    optimizer = make([parameter])
    for step in range(STEPS):
        parameter.grad = gradients(parameter.detach(), step)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_sgd_is_pytorchs(momentum, decay):
    ours = run(Local(momentum=momentum, weight_decay=decay).make(), 0.1)
    other = run_torch(lambda p: torch.optim.SGD(p, 0.1, momentum=momentum, weight_decay=decay))
    assert torch.allclose(ours, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_adam_is_pytorchs_adamw(decay):
    ours = run(Local(optimizer="adam", weight_decay=decay).make(), 0.1)
    other = run_torch(lambda p: torch.optim.AdamW(p, 0.1, weight_decay=decay))
    assert torch.allclose(ours, other, rtol=1e-5, atol=1e-6)


def test_server_optimizers_are_pytorchs():
    ours = run(ServerSgd(momentum=0.7).make(), 0.5)
    other = run_torch(lambda p: torch.optim.SGD(p, 0.5, momentum=0.7))
    assert torch.allclose(ours, other, rtol=1e-5, atol=1e-6)
    ours = run(adam(0.8, 0.95, 1e-3), 0.1)
    other = run_torch(lambda p: torch.optim.Adam(p, 0.1, betas=(0.8, 0.95), eps=1e-3))
    assert torch.allclose(ours, other, rtol=1e-5, atol=1e-6)


def test_fedadam_is_the_papers():
    # Reddi et al. (2021), Algorithm 2, number by number: v starts at tau^2, nothing is corrected for the start.
    beta1, beta2, tau, rate = 0.9, 0.99, 0.05, 0.1
    x, m, v = torch.linspace(-1, 1, SIZE).tolist(), [0.0] * SIZE, [tau**2] * SIZE
    for step in range(STEPS):
        delta = (-gradients(torch.tensor(x), step)).tolist()
        for i in range(SIZE):
            m[i] = beta1 * m[i] + (1 - beta1) * delta[i]
            v[i] = beta2 * v[i] + (1 - beta2) * delta[i] ** 2
            x[i] += rate * m[i] / (math.sqrt(v[i]) + tau)
    ours = run(ServerAdam(beta1=beta1, beta2=beta2, tau=tau).make(), rate)
    assert torch.allclose(ours, torch.tensor(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", [sgd(0.9), adam()], ids=["sgd", "adam"])
def test_a_step_changes_nothing_in_place(optimizer):
    params_P = torch.ones(3)
    state = optimizer.init(params_P)
    before = {name: value.clone() for name, value in state.items()}
    optimizer.step(params_P, torch.ones(3), state, 0.1)
    assert params_P.tolist() == [1, 1, 1]
    assert all(torch.equal(state[name], before[name]) for name in state)
