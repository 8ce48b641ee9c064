"""HopSkipJump: along the boundary by decisions alone (Chen, Jordan and Wainwright, 2020)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.black_box import asking, own_draws
from trilemma.attacks.evasion.geometry import project, steepest_step
from trilemma.attacks.evasion.search import errs, kept
from trilemma.attacks.evasion.types import Oracle
from trilemma.models.classifier import Classifier

#: Probes of the first gradient; the t-th has sqrt(t) times as many.
_FIRST_PROBES = 100
#: L2 length of a probe over that of the perturbation. Where a model rounds its input, shorter ones change nothing.
_REACH = 0.2
#: One in so many questions may go into looking for a misclassified image to start at.
_START_SHARE = 10
#: Levels of the grey images and pixels along a side of the noises' grains; so many starts compete at least.
_LEVELS, _GRAINS = (0.0, 0.5, 1.0), (1, 2, 4, 8)
_PLAIN_STARTS = len(_LEVELS) + 1 + len(_GRAINS)
#: A start must be misclassified at this share of the distance of the best so far, and is shortened so at most so often.
_NEARER, _SHORTENINGS = 0.8, 6
#: Steps along the gradient that are tried, each half as long as the one before.
_STEPS = 12
#: Fewer probes are not worth a gradient.
_LEAST_PROBES = 10
#: Probes that are drawn at once, and images that are asked about at once.
_DRAWN, _ASKED = 50, 500


def hop_skip_jump(
    classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    queries: int,
    answers: Oracle | None = None,
) -> Tensor:
    """Returns the nearest misclassified images that a walk along the boundary finds, moved into the budget.

    Begins, for each image, where it is misclassified nearest on the way to noises of several grains, to black, grey
    and white and to its negative. Then again and again: a binary search towards the clean image ends at the boundary;
    which of many small random changes are misclassified tells the direction across it; a step in that direction,
    halved until it is misclassified, leads away from the boundary and on along it. An image is done once it is
    misclassified within the budget. Images share the random changes, so no image's result depends on another's.

    Guarantees: within the budget and [0, 1]; radius 0 returns the images unchanged; of an answer only the class is
    used, and no gradient; at most `queries` answers per image; the classifier is left as found. An image for which
    nothing misclassified was found comes back unchanged.
    Cost: at most `queries` forward passes of the images that still stand; memory for a few times 500 images.
    References: Chen, Jordan and Wainwright (2020), Algorithm 2. Their probes are shorter, and models that round their
    input do not answer to those; their walks begin at a noise that is drawn for each image.

    Args:
        classifier: Asked where there are no `answers`.
        x_BCHW: Clean images in [0, 1].
        y_B: True labels.
        budget: What may be changed.
        generator: Source of the noises and the probes.
        queries: Questions per image, at most.
        answers: The model that ships: images -> logits.
    """
    if budget.radius == 0 or len(x_BCHW) == 0:
        return x_BCHW.clone()
    draws = own_draws(generator, "hop_skip_jump")
    start_draws, probe_draws = own_draws(draws, "starts"), own_draws(draws, "probes")
    nearest = _Nearest(x_BCHW.clone(), torch.full_like(y_B, torch.inf, dtype=x_BCHW.dtype))
    halvings = _halvings(x_BCHW)
    # Every round ends with a step, a binary search and a confirmation; who cannot pay for them is done.
    reserve, round_number = halvings + 2, 0
    with asking(classifier, answers) as ask:
        walk = _started(ask, x_BCHW, y_B, budget, queries, reserve, start_draws)
        while len(walk.index_M):
            round_number += 1
            _to_boundary(walk, ask, budget, halvings)
            broken_M = _confirmed(walk, ask, nearest, budget)
            walk = _kept(walk, ~broken_M & (walk.left_M >= reserve + _LEAST_PROBES))
            distance_M = _distance(walk.at_MCHW - walk.clean_MCHW, budget)
            reach_M = _REACH * torch.linalg.vector_norm(walk.at_MCHW - walk.clean_MCHW, dim=(1, 2, 3))
            probes_M = (walk.left_M - reserve).clamp(max=int(_FIRST_PROBES * math.sqrt(round_number)))
            gradient_MCHW = _gradient(walk, ask, reach_M, probes_M, own_draws(probe_draws, "round"))
            step_M = distance_M / math.sqrt(round_number)
            _step(walk, ask, steepest_step(gradient_MCHW, 1.0, budget.norm), step_M, halvings + 1)
    return project(nearest.x_BCHW, x_BCHW, budget)


@dataclass
class _Nearest:
    """The nearest misclassified image of every record; the clean one, infinitely far, where there is none."""

    x_BCHW: Tensor
    distance_B: Tensor


@dataclass
class _Walk:
    """The records that are worked on.

    Attributes:
        index_M: Their positions in the batch.
        clean_MCHW: The clean images.
        y_M: True labels.
        at_MCHW: Where the walk is: misclassified images.
        left_M: Questions that may still be asked.
        moved_M: Whether the walk is away from the boundary.
    """

    index_M: Tensor
    clean_MCHW: Tensor
    y_M: Tensor
    at_MCHW: Tensor
    left_M: Tensor
    moved_M: Tensor


def _kept(walk: _Walk, stay_M: Tensor) -> _Walk:
    return _Walk(*kept(stay_M, *(getattr(walk, field.name) for field in fields(walk))))


def _started(
    ask: Oracle, x_BCHW: Tensor, y_B: Tensor, budget: Budget, queries: int, reserve: int, draws: torch.Generator
) -> _Walk:
    """Returns the walks of the records whose clean image is classified correctly and for which a start is found.

    A start that is misclassified nearer than the best so far takes its place and is shortened until it is not; the
    noises come first, for boundaries that plain images lead to are often dead ends.
    """
    index_M = (~errs(ask(x_BCHW), y_B)).nonzero().squeeze(1)
    clean_MCHW, y_M = x_BCHW[index_M], y_B[index_M]
    left_M, found_M = torch.full_like(y_M, queries - 1), torch.zeros_like(y_M, dtype=torch.bool)
    walk = _Walk(index_M, clean_MCHW, y_M, clean_MCHW.clone(), left_M, found_M)
    distance_M = torch.full_like(y_M, torch.inf, dtype=x_BCHW.dtype)
    competing = max(_PLAIN_STARTS, queries // 100)
    for attempt, start_MCHW in enumerate(_starts(clean_MCHW, max(competing, queries // _START_SHARE), draws)):
        index_L = (~found_M | (attempt < competing)).nonzero().squeeze(1)
        for _ in range(_SHORTENINGS):
            (index_L,) = kept(left_M[index_L] > reserve, index_L)
            if not len(index_L):
                break
            clean_LCHW, start_LCHW = clean_MCHW[index_L], start_MCHW[index_L]
            share_L = _NEARER * distance_M[index_L] / _distance(start_LCHW - clean_LCHW, budget)
            shorter_LCHW = _blended(clean_LCHW, start_LCHW, share_L.clamp(max=1.0), budget)
            try_LCHW = torch.where(_wide(share_L < 1), shorter_LCHW, start_LCHW)
            wrong_L = errs(ask(try_LCHW), y_M[index_L])
            left_M[index_L] -= 1
            index_L, try_LCHW, clean_LCHW = kept(wrong_L, index_L, try_LCHW, clean_LCHW)
            walk.at_MCHW[index_L], found_M[index_L] = try_LCHW, True
            distance_M[index_L] = _distance(try_LCHW - clean_LCHW, budget)
    return _kept(walk, found_M)


def _starts(clean_MCHW: Tensor, count: int, draws: torch.Generator) -> Iterator[Tensor]:
    """Yields images that may be misclassified, one for each record: noises of every grain, plain ones, more noises."""
    for grain in _GRAINS:
        yield _noise(clean_MCHW, grain, draws)
    for level in _LEVELS:
        yield torch.full_like(clean_MCHW, level)
    yield 1.0 - clean_MCHW
    for attempt in range(count - _PLAIN_STARTS):
        noise_MCHW = _noise(clean_MCHW, _GRAINS[attempt % len(_GRAINS)], draws)
        # In turns black and white, and all grey levels.
        yield noise_MCHW.round() if attempt // len(_GRAINS) % 2 == 0 else noise_MCHW


def _noise(clean_MCHW: Tensor, grain: int, draws: torch.Generator) -> Tensor:
    """Returns uniform noise in squares of some pixels, the same for all records."""
    channels, height, width = clean_MCHW.shape[1:]
    shape = (1, channels, math.ceil(height / grain), math.ceil(width / grain))
    noise_1CHW = torch.rand(shape, generator=draws, device=draws.device).to(clean_MCHW)
    noise_1CHW = noise_1CHW.repeat_interleave(grain, dim=2).repeat_interleave(grain, dim=3)
    return noise_1CHW[:, :, :height, :width].expand_as(clean_MCHW)


def _to_boundary(walk: _Walk, ask: Oracle, budget: Budget, halvings: int) -> None:
    """Moves those that are away from the boundary back to its misclassified side, on the way to the clean image."""
    index_L = walk.moved_M.nonzero().squeeze(1)
    if not len(index_L):
        return
    clean_LCHW, y_L, far_LCHW = walk.clean_MCHW[index_L], walk.y_M[index_L], walk.at_MCHW[index_L]
    at_LCHW, low_L = far_LCHW, torch.zeros_like(y_L, dtype=far_LCHW.dtype)
    high_L = torch.ones_like(low_L)
    for _ in range(halvings):
        middle_L = (low_L + high_L) / 2
        try_LCHW = _blended(clean_LCHW, far_LCHW, middle_L, budget)
        wrong_L = errs(ask(try_LCHW), y_L)
        at_LCHW = torch.where(_wide(wrong_L), try_LCHW, at_LCHW)
        low_L, high_L = torch.where(wrong_L, low_L, middle_L), torch.where(wrong_L, middle_L, high_L)
    walk.at_MCHW[index_L] = at_LCHW
    walk.left_M[index_L] -= halvings


def _confirmed(walk: _Walk, ask: Oracle, nearest: _Nearest, budget: Budget) -> Tensor:
    """Notes the nearest images and returns which records are misclassified within the budget."""
    distance_M = _distance(walk.at_MCHW - walk.clean_MCHW, budget)
    nearer_M = distance_M < nearest.distance_B[walk.index_M]
    index_L = walk.index_M[nearer_M]
    nearest.x_BCHW[index_L], nearest.distance_B[index_L] = walk.at_MCHW[nearer_M], distance_M[nearer_M]
    broken_M = nearer_M & (distance_M <= budget.radius)
    if broken_M.any():
        # Rounding in the projection must not undo what lies just across the boundary.
        inside_LCHW = project(walk.at_MCHW[broken_M], walk.clean_MCHW[broken_M], budget)
        walk.left_M[broken_M] -= 1
        broken_M[broken_M.clone()] = errs(ask(inside_LCHW), walk.y_M[broken_M])
    return broken_M


def _gradient(walk: _Walk, ask: Oracle, reach_M: Tensor, probes_M: Tensor, draws: torch.Generator) -> Tensor:
    """Returns the direction across the boundary: small changes, weighted by their answers less the answers' mean.

    The paper's estimate with its baseline. All records have the same changes, cut off where an image leaves [0, 1].

    Args:
        walk: The records, at the boundary.
        ask: The model.
        reach_M: L2 length of the changes.
        probes_M: Questions for every record: the first so many changes.
        draws: Source of the changes.
    """
    weighted_MCHW, plain_MCHW = torch.zeros_like(walk.at_MCHW), torch.zeros_like(walk.at_MCHW)
    sum_M, most = torch.zeros_like(reach_M), int(probes_M.max()) if len(probes_M) else 0
    for start in range(0, most, _DRAWN):
        shape = (_DRAWN, *walk.at_MCHW.shape[1:])
        change_TCHW = torch.randn(shape, generator=draws, device=draws.device).to(walk.at_MCHW)
        change_TCHW /= torch.linalg.vector_norm(change_TCHW, dim=(1, 2, 3), keepdim=True)
        for rows in torch.arange(len(reach_M)).split(_ASKED // _DRAWN):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            at_L1CHW, y_L = walk.at_MCHW[part, None], walk.y_M[part]
            probe_LTCHW = (at_L1CHW + change_TCHW * reach_M[part, None, None, None, None]).clamp_(0.0, 1.0)
            asked_LT = start + torch.arange(_DRAWN, device=y_L.device) < probes_M[part, None]
            answer_LT = torch.zeros_like(asked_LT, dtype=reach_M.dtype)
            wrong_A = errs(ask(probe_LTCHW[asked_LT]), y_L[:, None].expand_as(asked_LT)[asked_LT])
            answer_LT[asked_LT] = wrong_A.to(reach_M.dtype) * 2.0 - 1.0
            probe_LTCHW -= at_L1CHW
            weighted_MCHW[part] += torch.einsum("lt,ltchw->lchw", answer_LT, probe_LTCHW)
            plain_MCHW[part] += torch.einsum("lt,ltchw->lchw", asked_LT.to(answer_LT), probe_LTCHW)
            sum_M[part] += answer_LT.sum(dim=1)
    walk.left_M -= probes_M
    mean_M = sum_M / probes_M
    # Where all answers are the same, nothing is left of them after their mean is taken off.
    return torch.where(_wide(mean_M.abs() == 1), _wide(mean_M) * plain_MCHW, weighted_MCHW - _wide(mean_M) * plain_MCHW)


def _step(walk: _Walk, ask: Oracle, direction_MCHW: Tensor, step_M: Tensor, keep: int) -> None:
    """Takes the longest of ever shorter steps that ends at a misclassified image; `keep` questions are not spent."""
    walk.moved_M = torch.zeros_like(walk.moved_M)
    for halving in range(_STEPS):
        index_L = (~walk.moved_M & (walk.left_M > keep)).nonzero().squeeze(1)
        if not len(index_L):
            break
        length_L = step_M[index_L] / 2**halving
        try_LCHW = (walk.at_MCHW[index_L] + direction_MCHW[index_L] * _wide(length_L)).clamp_(0.0, 1.0)
        wrong_L = errs(ask(try_LCHW), walk.y_M[index_L])
        walk.left_M[index_L] -= 1
        walk.at_MCHW[index_L[wrong_L]], walk.moved_M[index_L[wrong_L]] = try_LCHW[wrong_L], True


def _halvings(x_BCHW: Tensor) -> int:
    """Returns how often a binary search halves: until a quarter of what a probe reaches across the boundary is left."""
    return math.ceil(math.log2(4.0 * math.sqrt(x_BCHW[0].numel()) / _REACH))


def _blended(clean_LCHW: Tensor, far_LCHW: Tensor, share_L: Tensor, budget: Budget) -> Tensor:
    """Returns images at a share, in [0, 1], of the distance between clean and far ones, on the shortest way."""
    delta_LCHW = far_LCHW - clean_LCHW
    if budget.norm == "l2":
        return clean_LCHW + delta_LCHW * _wide(share_L)
    most_L111 = _wide(share_L * _distance(delta_LCHW, budget))
    return clean_LCHW + delta_LCHW.clamp(-most_L111, most_L111)


def _distance(delta_MCHW: Tensor, budget: Budget) -> Tensor:
    order = 2.0 if budget.norm == "l2" else math.inf
    return torch.linalg.vector_norm(delta_MCHW, ord=order, dim=(1, 2, 3))


def _wide(numbers_M: Tensor) -> Tensor:
    return numbers_M[:, None, None, None]
