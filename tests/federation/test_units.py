import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reference.naive_clipping import clipped_sum
from trilemma.federation import units
from trilemma.federation.units import mean_over_images, patients, unit_gradient_sum
from trilemma.models.classifier import Classifier
from trilemma.privacy.clipping_rules import Automatic, Flat, PerLayer
from trilemma.privacy.plan import PrivacyPlan
from trilemma.robustness.objectives import mean_cross_entropy


def net() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 3)
    return Classifier(nn.Sequential(*layers), 3)


def images(num: int, views: int = 1, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(num, views, 1, 8, 8, generator=g), torch.randint(3, (num,), generator=g)


def summed(clipper, views, sizes, clip=None):
    plan = PrivacyPlan(10, 0.5, 5.0, clipper, 1.0)
    return unit_gradient_sum(plan, net(), mean_cross_entropy, views, sizes, clip)


def test_patients_are_grouped_and_nobody_is_lost():
    groups = patients(np.array([7, 3, 7, 9, 3, 7]))
    assert [group.tolist() for group in groups] == [[1, 4], [0, 2, 5], [3]]
    assert patients(np.array([], int)) == ()


@pytest.mark.parametrize("views", [1, 2])
def test_a_unit_of_several_images_is_clipped_as_one(views):
    sizes = [2, 1, 3, 2]
    x, y = images(sum(sizes), views)
    expected, norms, start = torch.zeros(1, dtype=torch.float64), [], 0
    for size in sizes:
        mine = slice(start, start + size)
        one, norm = clipped_sum(
            net(),
            lambda logits, y_1, size=size, mine=mine: mean_cross_entropy(
                logits[0].unflatten(0, (size, views)), y[mine]
            ).mean()[None],
            x[mine].flatten(0, 1)[None],
            y[:1],
            2.0,
        )
        expected, start = expected + one, start + size
        norms += norm
    ours = summed(Flat(2.0), (x, y), sizes)
    assert torch.allclose(ours.sum_P.double(), expected, rtol=1e-4, atol=1e-6)
    assert sorted(ours.norms_B.tolist()) == pytest.approx(sorted(norms), rel=1e-4)
    assert min(norms) < 2.0 < max(norms)
    assert len(ours.losses_B) == len(ours.norms_BG) == 4


@pytest.mark.parametrize("kind", [Flat, PerLayer, Automatic])
@settings(deadline=None, max_examples=8)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), clip=st.floats(1e-3, 5), seed=st.integers(0, 99))
def test_no_patient_moves_the_sum_by_more_than_the_clip(kind, sizes, clip, seed):
    x, y = images(sum(sizes), seed=seed)
    x[: sizes[0]] *= 100
    whole = summed(kind(clip), (x, y), sizes).sum_P
    without = summed(kind(clip), (x[sizes[0] :], y[sizes[0] :]), sizes[1:]).sum_P
    assert float((whole - without).norm()) <= clip * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("kind", [Flat, PerLayer, Automatic])
@pytest.mark.parametrize("views", [1, 2])
def test_a_unit_of_very_many_images_is_added_up_and_clipped_as_one(kind, views, monkeypatch):
    sizes = [1, 5, 7, 5]
    x, y = images(sum(sizes), views)
    whole = summed(kind(0.5), (x, y), sizes)
    monkeypatch.setattr(units, "IMAGES_TOGETHER", 4)
    parts = summed(kind(0.5), (x, y), sizes)
    torch.testing.assert_close(parts.sum_P, whole.sum_P, rtol=1e-4, atol=1e-6)
    for field in ("norms_B", "losses_B", "norms_BG"):
        torch.testing.assert_close(getattr(parts, field), getattr(whole, field), rtol=1e-4, atol=1e-6)


def test_clipping_images_one_by_one_would_let_a_patient_move_it_further():
    # The negative control of the test above.
    x, y = images(4)
    alone, together = (summed(Flat(0.1), (x, y), sizes).sum_P for sizes in ([1, 1, 1, 1], [4]))
    assert float(together.norm()) <= 0.1 * 1.0001
    assert float(alone.norm()) > 0.11


def test_nobody_drawn_is_zero():
    x, y = images(0)
    nothing = summed(Flat(1.0), (x, y), [])
    assert not nothing.sum_P.any() and len(nothing.losses_B) == 0


def test_the_current_clip_stands_in_for_the_first():
    x, y = images(3)
    assert torch.equal(summed(Flat(9.0), (x, y), [1, 2], 0.1).sum_P, summed(Flat(0.1), (x, y), [1, 2]).sum_P)


def test_a_units_loss_is_the_mean_over_its_images():
    logits_BWK, y_BS = torch.randn(4, 6, 3), torch.randint(3, (4, 2))
    ours = mean_over_images(mean_cross_entropy)(logits_BWK, y_BS)
    parts = [mean_cross_entropy(logits_BWK[:, 3 * i : 3 * i + 3], y_BS[:, i]) for i in (0, 1)]
    assert torch.allclose(ours, (parts[0] + parts[1]) / 2)
