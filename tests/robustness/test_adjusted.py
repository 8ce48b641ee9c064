"""Logit adjustment: worked out by hand, one record at a time, and its effect where it is known in closed form."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from reference.naive_clipping import clipped_sum
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9
from trilemma.privacy import bookkeeping, clipping
from trilemma.privacy.clipping_rules import Flat
from trilemma.robustness.objectives import adjusted, standard
from trilemma.robustness.specs import Mart, NFgsmTraining, PgdTraining, Trades

SHARES = (0.7, 0.2, 0.1)


def setting():
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.rand(6, 1, 16, 16, generator=generator)
    return Resnet9(width=4).make(1, 16, 3, seed=1), x_BCHW, torch.tensor([0, 1, 2, 0, 1, 2])


def test_the_loss_by_hand():
    """Menon et al. (2021), equation 10 with tau = 1: -log(p_y exp(f_y) / sum_k p_k exp(f_k))."""
    logits_BVK, y_B = torch.tensor([[[1.0, 2.0, 0.5]], [[0.0, 0.0, 0.0]]]), torch.tensor([2, 0])
    weighed_BK = torch.tensor(SHARES) * logits_BVK[:, 0].exp()
    expected_B = -(weighed_BK[[0, 1], y_B] / weighed_BK.sum(1)).log()
    found_B = adjusted(standard(), SHARES).loss(logits_BVK, y_B)
    torch.testing.assert_close(found_B, expected_B)
    assert found_B[1].item() == pytest.approx(-torch.tensor(0.7).log().item())  # without evidence: how frequent it is
    equal_B = adjusted(standard(), (1 / 3,) * 3).loss(logits_BVK, y_B)
    torch.testing.assert_close(equal_B, standard().loss(logits_BVK, y_B))


DEFENCES = [PgdTraining(steps=2), NFgsmTraining(), Trades(steps=2), Mart(steps=2)]


@pytest.mark.parametrize("spec", DEFENCES, ids=lambda spec: spec.kind)
def test_a_defence_is_adjusted_in_its_loss_and_crafts_the_same_images(spec):
    classifier, x_BCHW, y_B = setting()
    plain, raised = spec.make(), adjusted(spec.make(), SHARES)
    views = [o.views(classifier, x_BCHW, y_B, torch.Generator().manual_seed(3)) for o in (plain, raised)]
    assert torch.equal(*views)
    logits_BVK = torch.randn(6, views[0].shape[1], 3, generator=torch.Generator().manual_seed(1))
    expected_B = plain.loss(logits_BVK + torch.tensor(SHARES).log(), y_B)
    torch.testing.assert_close(raised.loss(logits_BVK, y_B), expected_B)
    assert not torch.allclose(expected_B, plain.loss(logits_BVK, y_B))


@pytest.mark.parametrize("spec", [None, NFgsmTraining(), Trades(steps=2)], ids=["standard", "nfgsm", "trades"])
def test_every_records_gradient_is_that_of_its_own_loss(spec):
    """The sum that DP-SGD clips, against torch.func, one record at a time."""
    classifier, x_BCHW, y_B = setting()
    objective = adjusted(spec.make() if spec else standard(), SHARES)
    views_BVCHW = objective.views(classifier, x_BCHW, y_B, torch.Generator().manual_seed(0))
    names = [name for name, p in classifier.named_parameters() if p.requires_grad]
    start = {name: p.detach() for name, p in classifier.named_parameters()}

    def loss_of_one(params, x_VCHW, y):
        return objective.loss(functional_call(classifier, params, (x_VCHW,))[None], y[None]).sum()

    gradients = vmap(grad(loss_of_one), in_dims=(None, 0, 0))(start, views_BVCHW, y_B)
    rows_BP = torch.cat([gradients[name].flatten(1) for name in names], dim=1)
    clip = float(rows_BP.norm(dim=1).median())  # so that some are clipped and some are not
    scale_B1 = (clip / rows_BP.norm(dim=1, keepdim=True)).clamp(max=1)
    naive_P, _ = clipped_sum(classifier, objective.loss, views_BVCHW, y_B, clip)
    torch.testing.assert_close((rows_BP * scale_B1).sum(0), naive_P.float(), rtol=1e-3, atol=1e-5)
    for engine in (clipping, bookkeeping):
        found = engine.clipped_gradient_sum(classifier, objective.loss, views_BVCHW, y_B, Flat(clip))
        torch.testing.assert_close(found.sum_P, naive_P.float(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.norms_B, rows_BP.norm(dim=1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("shares", "threshold"), [(None, 0.5), ((0.88, 0.12), 0.0)])
def test_a_boundary_moves_to_where_both_classes_are_equally_likely(shares, threshold):
    """One pixel, two normal densities at -1 and 1 of unit width: the boundary lies at log(odds) / 2, adjusted at 0."""
    generator = torch.Generator().manual_seed(0)
    y_N = (torch.rand(4000, generator=generator) < 0.12).long()
    x_N = (2 * y_N - 1) + torch.randn(4000, generator=generator)
    classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(1, 2)), 2, mean=0.0, std=1.0)
    objective = standard() if shares is None else adjusted(standard(), shares)
    optimiser = torch.optim.LBFGS(classifier.parameters(), max_iter=60)

    def closure():
        optimiser.zero_grad()
        loss = objective.loss(classifier(x_N.view(-1, 1, 1, 1))[:, None], y_N).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    weight_K, bias_K = classifier.module[1].weight[:, 0].detach(), classifier.module[1].bias.detach()
    boundary = float(-(bias_K[1] - bias_K[0]) / (weight_K[1] - weight_K[0]))
    expected = torch.log(torch.tensor(0.88 / 0.12)).item() / 2 if threshold else 0.0
    assert boundary == pytest.approx(expected, abs=0.12)
