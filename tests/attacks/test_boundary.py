import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.smallest_problem import answered, curved, grey, linear
from reference.naive_evasion import length_one, nearest_plane_one, plane_step_one
from trilemma.attacks.evasion.boundary import BEYOND, Boundary, linear_step, nearest_boundary, step_to_boundary
from trilemma.attacks.evasion.smallest import length

norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def planes(seed: int, share: float, size: int = 8):
    """Four images with pixels at both ends and hyperplanes at a share of what is reachable within [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(4, 1, 1, size, generator=generator, dtype=torch.float64) * 1.6 - 0.3).clamp(0, 1)
    normal = torch.randn(4, 1, 1, size, generator=generator, dtype=torch.float64)
    sign = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    up = -sign[:, None, None, None] * normal
    reachable = (up.abs() * torch.where(up > 0, 1 - x, x)).sum((1, 2, 3))
    return x, Boundary(sign * share * reachable, normal)


@norms
@given(seed=st.integers(0, 10_000), share=st.floats(0.01, 0.98))
@settings(deadline=None, max_examples=30)
def test_the_step_is_the_shortest_one_that_general_solvers_find(norm, seed, share):
    x, boundary = planes(seed, share)
    delta = step_to_boundary(x, boundary, norm)
    for i in range(len(x)):
        expected = plane_step_one(x[i], boundary.normal_BCHW[i], float(boundary.gap_B[i]), norm)
        assert length_one(delta[i], norm) == pytest.approx(length_one(expected, norm), rel=1e-4, abs=1e-7)
        assert torch.allclose(delta[i], expected, atol=2e-4)


@norms
@given(seed=st.integers(0, 10_000), share=st.floats(1e-6, 0.999), size=st.sampled_from([1, 2, 50, 700]))
@settings(deadline=None, max_examples=40)
def test_the_step_ends_on_the_plane_and_in_the_image_range(norm, seed, share, size):
    x, boundary = planes(seed, share, size)
    delta = step_to_boundary(x, boundary, norm)
    left = boundary.gap_B + (boundary.normal_BCHW * delta).sum((1, 2, 3))
    assert (left.abs() <= 1e-10 * boundary.gap_B.abs().clamp(min=1e-6)).all()
    assert (x + delta).min() >= -1e-15
    assert (x + delta).max() <= 1 + 1e-15


@norms
def test_a_plane_out_of_reach_gives_the_nearest_corner(norm):
    x, boundary = planes(3, 1.5)
    corner = torch.stack(
        [plane_step_one(*row, norm) for row in zip(x, boundary.normal_BCHW, boundary.gap_B.tolist(), strict=True)]
    )
    assert torch.allclose(step_to_boundary(x, boundary, norm), corner, atol=1e-12)


@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", ["box", "linear"])
def test_planes_that_make_no_sense_move_nothing_out_of_the_numbers(norm, dtype, step):
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    gap = torch.tensor([-1.0, 0.0, float("nan"), -1e30, -1e-30, -1.0], dtype=dtype)
    normal = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    normal[0] = 0.0
    normal[4] *= 1e-30
    normal[5, 0, 0, 1:] *= 1e-38
    boundary = Boundary(gap, normal)
    delta = step_to_boundary(x, boundary, norm) if step == "box" else linear_step(boundary, norm)
    assert delta.isfinite().all()
    assert delta.abs().max() <= 1
    assert not delta[:3].any()  # no normal, no gap, no number
    assert delta[3].any()
    # Scaling the gap and the normal changes nothing, though the squares of these underflow.
    large = Boundary(gap[4:5] * 1e30, normal[4:5] * 1e30)
    again = step_to_boundary(x[4:5], large, norm) if step == "box" else linear_step(large, norm)
    assert torch.allclose(delta[4:5], again, rtol=1e-4, atol=1e-6)


@norms
def test_the_linear_step_ends_on_the_plane_by_the_shortest_way(norm):
    x, boundary = planes(5, 0.01)
    delta = linear_step(boundary, norm)
    assert torch.allclose((boundary.normal_BCHW * delta).sum((1, 2, 3)), -boundary.gap_B)
    slope = torch.linalg.vector_norm(boundary.normal_BCHW, ord=1 if norm == "linf" else 2, dim=(1, 2, 3))
    assert torch.allclose(length(delta, norm), boundary.gap_B.abs() / slope)


@norms
@pytest.mark.parametrize("make", [linear, curved])
def test_the_nearest_boundary_is_that_of_the_twin_that_looks_at_one_class_at_a_time(norm, make):
    classifier, x = make(5), grey(6, 0.4)
    y = answered(classifier, x)
    wrong = torch.stack([torch.tensor([k for k in range(5) if k != label]) for label in y.tolist()])
    found = nearest_boundary(classifier, x, y, wrong, torch.zeros(6, dtype=torch.float64), norm)
    chosen = set()
    for i in range(len(x)):
        gap, normal = nearest_plane_one(classifier, x[i], int(y[i]), wrong[i].tolist(), norm, BEYOND)
        assert found.gap_B[i] == pytest.approx(gap)
        assert torch.allclose(found.normal_BCHW[i], normal)
        chosen.add(round(gap, 9))
    assert len(chosen) > 1


def test_a_lead_moves_the_boundary_away():
    classifier, x = linear(3), grey(4)
    y, lead = answered(classifier, x), torch.full((4,), 0.7, dtype=torch.float64)
    classes = torch.stack([(y + 1) % 3], dim=1)
    near = nearest_boundary(classifier, x, y, classes, torch.zeros_like(lead), "l2")
    assert torch.allclose(nearest_boundary(classifier, x, y, classes, lead, "l2").gap_B, near.gap_B - 0.7)


def test_the_plane_is_the_same_seen_from_elsewhere():
    classifier, x, other = linear(3), grey(4), grey(4, seed=9)
    y = torch.zeros(4, dtype=torch.long)
    lead, classes = torch.zeros(4, dtype=torch.float64), torch.full((4, 1), 2)
    here = nearest_boundary(classifier, x, y, classes, lead, "l2").seen_from(x, other)
    assert torch.allclose(here.gap_B, nearest_boundary(classifier, other, y, classes, lead, "l2").gap_B)
