"""The fast adaptive boundary attack (Croce and Hein, 2020b): the smallest perturbation, without a step size."""

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.boundary import nearest_boundary, step_to_boundary
from trilemma.attacks.evasion.frozen import frozen
from trilemma.attacks.evasion.search import kept
from trilemma.attacks.evasion.smallest import Smallest, length
from trilemma.attacks.evasion.types import Oracle
from trilemma.models.classifier import Classifier

#: The paper's constants: how much the way from the clean image counts at most, by how much a step goes
#: beyond the boundary, and how much of a perturbation is kept where it is adversarial.
ALPHA_MAX = 0.1
ETA = 1.05
BETA = 0.9
#: Steps of the search between the clean image and what was found, which ends a start.
FINAL_STEPS = 3


def fab(
    classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    steps: int,
    restarts: int = 1,
    num_targets: int | None = None,
    answers: Oracle | None = None,
) -> Tensor:
    """Returns the nearest adversarial images found by steps to linearised boundaries, drawn towards the clean image.

    Each step goes to the linearised boundary from where the search is, a little also from the clean image; an
    adversarial image is pulled back by a tenth, and the search goes on from there. The first start is the clean image,
    further ones are random at half the radius (the paper takes half of the nearest distance found where that is
    smaller, but then the image is broken here).

    Guarantees: within the budget and [0, 1], where what was found lies farther away after projection; radius 0 returns
    the images unchanged; the same draws from the generator whatever breaks; the classifier is left as found.
    Cost: one forward pass; for each start, step and image that still stands two more and K - 1 backward passes, with
    targets 1 backward pass; `FINAL_STEPS` + 1 forward passes for each start.
    References: Croce and Hein (2020b), Algorithm 1; targets as in Croce and Hein (2020).

    Args:
        classifier: The classifier under attack.
        x_BCHW: Clean images in [0, 1].
        y_B: True labels.
        budget: What may be changed.
        generator: Source of the random starts.
        steps: Steps per start.
        restarts: Starts, the first at the clean image (for each target).
        num_targets: Wrong classes whose boundaries are looked for one by one, the likeliest first, at most all of
            them; None looks in every step for the nearest of all.
        answers: The model that ships; None where that is the classifier.
    """
    if budget.radius == 0 or len(x_BCHW) == 0:
        return x_BCHW.clone()
    with frozen(classifier):
        smallest = Smallest(classifier, x_BCHW, y_B, budget, answers=answers)
        classes_BT = smallest.likeliest_wrong(num_targets)
        for aims_BT in (classes_BT,) if num_targets is None else classes_BT.split(1, dim=1):
            for restart in range(restarts):
                start_BCHW = x_BCHW if restart == 0 else _start(x_BCHW, budget, generator)
                approach(smallest, start_BCHW, aims_BT, steps=steps)
    return smallest.images()


def approach(smallest: Smallest, start_BCHW: Tensor, classes_BT: Tensor, *, steps: int) -> None:
    """Searches from one start and leaves in `smallest` what it finds; call it within `frozen`.

    Args:
        smallest: What was found before; its broken records are left alone.
        start_BCHW: Where to begin.
        classes_BT: The wrong classes whose boundaries are looked for.
        steps: Steps.
    """
    norm, index_M = smallest.budget.norm, smallest.active()
    x_MCHW, clean_MCHW = start_BCHW[index_M], smallest.x_BCHW[index_M]
    y_M, classes_MT = smallest.y_B[index_M], classes_BT[index_M]
    for _ in range(steps):
        if not len(index_M):
            return
        boundary = nearest_boundary(smallest.classifier, x_MCHW, y_M, classes_MT, smallest.lead_B[index_M], norm)
        here_MCHW = step_to_boundary(x_MCHW, boundary, norm)
        clean_boundary = boundary.seen_from(x_MCHW, clean_MCHW)
        origin_MCHW = step_to_boundary(clean_MCHW, clean_boundary, norm)
        alpha_M111 = _alpha(length(here_MCHW, norm), length(origin_MCHW, norm))
        x_MCHW = (1 - alpha_M111) * (x_MCHW + ETA * here_MCHW) + alpha_M111 * (clean_MCHW + ETA * origin_MCHW)
        x_MCHW = x_MCHW.clamp_(0.0, 1.0)
        stay_M, wrong_M = smallest.ask(index_M, x_MCHW)
        x_MCHW = torch.where(wrong_M[:, None, None, None], clean_MCHW + BETA * (x_MCHW - clean_MCHW), x_MCHW)
        index_M, x_MCHW, clean_MCHW, y_M, classes_MT = kept(stay_M, index_M, x_MCHW, clean_MCHW, y_M, classes_MT)
    _pull_back(smallest)


def _alpha(here_M: Tensor, origin_M: Tensor) -> Tensor:
    """Returns how much the way from the clean image counts, shape (M, 1, 1, 1)."""
    both_M = (here_M + origin_M).clamp(min=torch.finfo(here_M.dtype).tiny)
    return (here_M / both_M).clamp(max=ALPHA_MAX)[:, None, None, None]


def _pull_back(smallest: Smallest) -> None:
    """Moves what was found outside the budget nearer to the clean image: the paper's final search.

    Where on the straight way the gap is 0 is estimated from the gaps at both ends; a little beyond is asked.
    """
    index_M = (~smallest.broken_B & smallest.distance_B.isfinite()).nonzero().squeeze(1)
    if not len(index_M):
        return
    clean_MCHW = smallest.x_BCHW[index_M]
    way_MCHW = smallest.nearest_BCHW[index_M] - clean_MCHW
    with torch.no_grad():
        below_M = smallest.gaps(index_M, smallest.clean_logits_BK[index_M])
        above_M = smallest.gaps(index_M, smallest.classifier(clean_MCHW + way_MCHW))
    low_M, high_M = torch.zeros_like(below_M), torch.ones_like(below_M)
    for _ in range(FINAL_STEPS):
        root_M = low_M + (high_M - low_M) * (below_M / (below_M - above_M)).nan_to_num(nan=0.5).clamp(0.0, 1.0)
        share_M = root_M + (1.0 - 1.0 / ETA) * (high_M - root_M)
        x_MCHW = (clean_MCHW + share_M[:, None, None, None] * way_MCHW).clamp_(0.0, 1.0)
        with torch.no_grad():
            logits_MK = smallest.classifier(x_MCHW)
        stay_M, wrong_M = smallest.offer(index_M, x_MCHW, logits_MK)
        gap_M = smallest.gaps(index_M, logits_MK)
        low_M, below_M = torch.where(wrong_M, low_M, share_M), torch.where(wrong_M, below_M, gap_M)
        high_M, above_M = torch.where(wrong_M, share_M, high_M), torch.where(wrong_M, gap_M, above_M)
        index_M, clean_MCHW, way_MCHW, low_M, high_M, below_M, above_M = kept(
            stay_M, index_M, clean_MCHW, way_MCHW, low_M, high_M, below_M, above_M
        )
        if not len(index_M):
            return


def _start(x_BCHW: Tensor, budget: Budget, generator: torch.Generator) -> Tensor:
    """Returns images at half the radius from the clean ones in a random direction, cut off at [0, 1]."""
    if budget.norm == "linf":
        noise_BCHW = torch.rand(x_BCHW.shape, generator=generator, device=generator.device).to(x_BCHW) * 2.0 - 1.0
    else:
        noise_BCHW = torch.randn(x_BCHW.shape, generator=generator, device=generator.device).to(x_BCHW)
    share_B111 = (budget.radius / 2) / length(noise_BCHW, budget.norm)[:, None, None, None]
    return (x_BCHW + noise_BCHW * share_B111).clamp_(0.0, 1.0)
