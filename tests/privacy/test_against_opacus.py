"""The fast engine against an outside oracle: Opacus's per-sample gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch.nn import functional as F

from trilemma.models.specs import Resnet9, Resnet18
from trilemma.privacy.bookkeeping import clipped_gradient_sum, why_slow
from trilemma.privacy.clipping_rules import Flat
from trilemma.robustness.objectives import mean_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:.*non-full backward hook")

MODELS = [Resnet9(width=8), Resnet9(width=8, norm="none"), Resnet9(width=8, activation="mish"), Resnet18(width=8)]
MODELS += [Resnet9(width=8, norm="weight"), Resnet18(width=4, norm="weight", activation="mish")]


def opacus(classifier, x_BCHW, y_B, clip):
    model = GradSampleModule(classifier, loss_reduction="sum")
    F.cross_entropy(model(x_BCHW), y_B, reduction="sum").backward()
    rows_BP = torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], dim=1)
    norms_B = rows_BP.norm(dim=1)
    return (clip / norms_B).clamp(max=1) @ rows_BP, norms_B


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.label)
@settings(deadline=None, max_examples=4)
@given(num=st.integers(1, 6), clip=st.sampled_from([0.1, 10.0, 1e6]), seed=st.integers(0, 99))
def test_norms_and_clipped_sums_are_those_of_opacus(spec, num, clip, seed):
    draws = torch.Generator().manual_seed(seed)
    x_BCHW = torch.rand(num, 1, 16, 16, generator=draws, dtype=torch.float64)
    y_B = torch.randint(3, (num,), generator=draws)
    classifier = spec.make(1, 16, 3, seed=0).double()
    assert why_slow(classifier, x_BCHW.shape[1:]) is None
    ours = clipped_gradient_sum(classifier, mean_cross_entropy, x_BCHW[:, None], y_B, Flat(clip))
    sum_P, norms_B = opacus(spec.make(1, 16, 3, seed=0).double(), x_BCHW, y_B, clip)
    torch.testing.assert_close(ours.norms_B, norms_B, rtol=1e-9, atol=0)
    assert (ours.sum_P - sum_P).norm() <= 1e-9 * sum_P.norm()
