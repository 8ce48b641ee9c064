import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.naive_evasion import project_one
from trilemma.attacks.budget import Budget, check_radius
from trilemma.attacks.evasion.geometry import project, random_start, steepest_step

norms = st.sampled_from(["linf", "l2"])
radii = st.floats(0, 2, allow_nan=False)
seeds = st.integers(0, 10_000)


def pair(seed: int, channels: int = 2, size: int = 3):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(4, channels, size, size, generator=generator, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
    return x + torch.randn(x.shape, generator=generator, dtype=torch.float64), x


@settings(deadline=None, max_examples=50)
@given(norm=norms, radius=radii, seed=seeds)
def test_project_matches_the_naive_twin(norm, radius, seed):
    x_adv, x = pair(seed)
    twin = torch.stack([project_one(a, b, norm, radius) for a, b in zip(x_adv, x, strict=True)])
    assert torch.allclose(project(x_adv, x, Budget(norm, radius)), twin, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(norm=norms, radius=radii, seed=seeds)
def test_project_twice_is_project_once_and_keeps_what_is_inside(norm, radius, seed):
    x_adv, x = pair(seed)
    once = project(x_adv, x, Budget(norm, radius))
    assert torch.allclose(project(once, x, Budget(norm, radius)), once, atol=1e-12)
    assert torch.equal(project(x, x, Budget(norm, radius)), x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radius_0_is_the_clean_image_bit_for_bit(norm):
    x_adv, x = (t.float() for t in pair(0))
    assert torch.equal(project(x_adv, x, Budget(norm, 0.0)), x)


def test_project_by_hand():
    x = torch.tensor([[[[0.5, 0.9]]]])
    x_adv = torch.tensor([[[[0.8, 1.3]]]])
    assert torch.allclose(project(x_adv, x, Budget("linf", 0.2)), torch.tensor([[[[0.7, 1.0]]]]))
    # The perturbation (.3, .4) has length .5; half of it is (.15, .2), and .9 + .2 is cut off.
    assert torch.allclose(project(x_adv, x, Budget("l2", 0.25)), torch.tensor([[[[0.65, 1.0]]]]))


def test_project_does_not_write_into_its_arguments():
    x_adv, x = pair(1)
    copies = x_adv.clone(), x.clone()
    for norm in ("linf", "l2"):
        project(x_adv, x, Budget(norm, 0.1))
    assert torch.equal(x_adv, copies[0])
    assert torch.equal(x, copies[1])


@settings(deadline=None, max_examples=25)
@given(norm=norms, radius=st.floats(1e-3, 2), seed=seeds)
def test_random_start_stays_in_the_ball(norm, radius, seed):
    _, x = pair(seed)
    start = random_start(x, Budget(norm, radius), torch.Generator().manual_seed(seed))
    delta = (start - x).flatten(1)
    length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (length <= radius + 1e-9).all()
    assert start.min() >= 0
    assert start.max() <= 1


def test_random_start_is_uniform_in_the_ball():
    x = torch.full((4000, 1, 1, 2), 0.5)
    linf = random_start(x, Budget("linf", 0.2), torch.Generator().manual_seed(0)) - x
    assert abs(float(linf.std()) - 0.2 / math.sqrt(3)) < 2e-3
    l2 = random_start(x, Budget("l2", 0.2), torch.Generator().manual_seed(0)) - x
    length = l2.flatten(1).norm(dim=1)
    # Of a disc's area a quarter lies within half the radius; uniform lengths would give a half.
    assert abs(float((length < 0.1).float().mean()) - 0.25) < 0.03


@settings(deadline=None, max_examples=25)
@given(scale=st.sampled_from([1e-40, 1e-30, 1e-10, 1.0, 1e10, 1e30]), seed=seeds)
def test_a_step_has_its_length_whatever_the_gradients_scale(scale, seed):
    gradient = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(seed)).double().mul(scale).float()
    linf = steepest_step(gradient, 0.3, "linf")
    assert torch.equal(linf.abs().amax((1, 2, 3)), torch.full((3,), 0.3))
    l2 = steepest_step(gradient, 0.3, "l2").flatten(1)
    assert torch.allclose(l2.norm(dim=1), torch.full((3,), 0.3), rtol=1e-4)
    direction = gradient.double().flatten(1)
    direction = direction / direction.norm(dim=1, keepdim=True)
    assert torch.allclose(l2.double(), 0.3 * direction, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_gradient_gives_no_step(norm):
    assert torch.equal(steepest_step(torch.zeros(2, 1, 2, 2), 1.0, norm), torch.zeros(2, 1, 2, 2))


def test_entries_that_are_not_finite_do_not_spoil_the_others():
    broken = torch.tensor([[[[torch.nan, 3.0], [4.0, 0.0]]], [[[torch.inf, 3.0], [-torch.inf, 1.0]]]])
    linf = steepest_step(broken, 0.1, "linf")
    assert torch.allclose(linf[:, 0], torch.tensor([[[0.0, 0.1], [0.1, 0.0]], [[0.1, 0.1], [-0.1, 0.1]]]))
    l2 = steepest_step(broken, 0.1, "l2")
    half = 0.1 / 2**0.5
    assert torch.allclose(l2[:, 0], torch.tensor([[[0.0, 0.06], [0.08, 0.0]], [[half, 0.0], [-half, 0.0]]]))


def test_budget_labels_and_limits():
    assert Budget("linf", 4 / 255).label == "Linf 4/255"
    assert Budget("linf", 0.01).label == "Linf 0.01"
    assert Budget("linf", 0.0).label == "Linf 0"
    assert Budget("l2", 0.5).label == "L2 0.5"
    check_radius("l2", 3.0)
    check_radius("linf", 1.0)
    with pytest.raises(ValueError, match="beyond 1"):
        check_radius("linf", 4.0)
