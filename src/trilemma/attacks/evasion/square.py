"""The square attack: random search with square patches, from logits alone (Andriushchenko et al., 2020)."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.black_box import asking, own_draws
from trilemma.attacks.evasion.losses import margin
from trilemma.attacks.evasion.search import errs, kept
from trilemma.attacks.evasion.types import Oracle
from trilemma.models.classifier import Classifier

#: After so many of 10000 questions the share of pixels that a square covers halves.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
#: Moves that are drawn at once.
_DRAWN = 32
#: Tiles along a side of the first L2 perturbation.
_TILES = 5


def square(
    classifier: Classifier,
    x_BCHW: Tensor,
    y_B: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    queries: int,
    first_share: float = 0.8,
    answers: Oracle | None = None,
    stop: bool = True,
) -> Tensor:
    """Returns the worst images that a random search over square patches finds.

    Starts on the surface of the ball (L-infinity: upright stripes; L2: a grid of dipoles) and proposes one change
    after another; one that raises the margin, or breaks the image, is kept. For L-infinity a square takes one sign per
    channel; for L2 the length within two squares goes into a dipole in the first of them. The squares shrink. Worst,
    for each image by itself: misclassified before classified correctly, then the largest margin; the clean image
    competes too. No image's result depends on another's.

    Guarantees: within the budget and [0, 1]; radius 0 returns the images unchanged; no gradient is asked for; every
    image is asked about exactly `queries` times, or fewer where it is broken before and `stop` is set; the
    classifier is left as found.
    Cost: `queries` forward passes of the images that still stand: the clean ones, the start, then one per change.
    References: Andriushchenko et al. (2020), Algorithms 1 to 3; the schedule of their experiments, in shares of
    `queries`. Unlike in their code the squares reach the last row and column.

    Args:
        classifier: Asked where there are no `answers`.
        x_BCHW: Clean images in [0, 1].
        y_B: True labels.
        budget: What may be changed.
        generator: Source of the squares.
        queries: Questions per image, at least 2.
        first_share: Of an image's pixels that the first squares cover.
        answers: The model that ships: images -> logits. Its argument is overwritten after the call.
        stop: Whether broken images leave the batch; without it each is driven to the largest margin.
    """
    if budget.radius == 0 or len(x_BCHW) == 0:
        return x_BCHW.clone()
    draws = own_draws(generator, "square")
    begin, propose = (_stripes, _move_linf) if budget.norm == "linf" else (_dipoles, _move_l2)
    worst_BCHW = x_BCHW.clone(memory_format=torch.contiguous_format)
    with asking(classifier, answers) as ask:
        clean = _judged(ask(x_BCHW), y_B)
        start_BCHW = begin(x_BCHW, budget, draws)
        index_M = torch.arange(len(y_B), device=x_BCHW.device)
        if stop:
            index_M = (~clean.wrong_M).nonzero().squeeze(1)
            if not len(index_M):
                return worst_BCHW
        at_MCHW, y_M = start_BCHW[index_M], y_B[index_M]
        walk = _Walk(index_M, x_BCHW[index_M].contiguous(), y_M, at_MCHW, _judged(ask(at_MCHW), y_M))
        for side, move in _moves(x_BCHW, _sides(queries, first_share, budget, x_BCHW.shape[2:]), budget, draws):
            if stop and walk.verdict.wrong_M.any():
                walk = _without_broken(walk, worst_BCHW)
            if not len(walk.index_M):
                break
            propose(walk, ask, _Move(*(numbers_B.index_select(0, walk.index_M) for numbers_B in move)), side, budget)
    worse_M = _beats(walk.verdict, _Verdict(clean.loss_M[walk.index_M], clean.wrong_M[walk.index_M]))
    worst_BCHW[walk.index_M[worse_M]] = walk.at_MCHW[worse_M]
    return worst_BCHW


class _Verdict(NamedTuple):
    loss_M: Tensor
    wrong_M: Tensor


class _Move(NamedTuple):
    """Random numbers of one proposal for each of some records.

    Attributes:
        corner_MK: Upper left pixels of the squares, one for "linf" and two for "l2", counted row by row.
        sign_MC: 1 or -1 for every channel.
        other_MC: For "linf" a change of some of the signs, -1 for those; for "l2" 0, or 1 for a dipole lying down.
    """

    corner_MK: Tensor
    sign_MC: Tensor
    other_MC: Tensor


@dataclass
class _Walk:
    """The records that are worked on, where the search stands with each and what the model said there."""

    index_M: Tensor
    clean_MCHW: Tensor
    y_M: Tensor
    at_MCHW: Tensor
    verdict: _Verdict


def _judged(logits_MK: Tensor, y_M: Tensor) -> _Verdict:
    # A margin that is not a number must neither win nor be unbeatable.
    loss_M = margin(logits_MK, y_M).nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return _Verdict(loss_M, errs(logits_MK, y_M))


def _beats(new: _Verdict, old: _Verdict) -> Tensor:
    return (new.wrong_M & ~old.wrong_M) | ((new.wrong_M == old.wrong_M) & (new.loss_M > old.loss_M))


def _accepted(walk: _Walk, logits_MK: Tensor) -> Tensor:
    """Returns which proposals are kept, as (M, 1, 1), and keeps their verdicts."""
    new = _judged(logits_MK, walk.y_M)
    better_M = _beats(new, walk.verdict)
    walk.verdict = _Verdict(
        torch.where(better_M, new.loss_M, walk.verdict.loss_M), torch.where(better_M, new.wrong_M, walk.verdict.wrong_M)
    )
    return better_M[:, None, None]


def _without_broken(walk: _Walk, worst_BCHW: Tensor) -> _Walk:
    """Writes the broken images down and returns the walk of the others."""
    wrong_M = walk.verdict.wrong_M
    worst_BCHW[walk.index_M[wrong_M]] = walk.at_MCHW[wrong_M]
    index_M, clean_MCHW, y_M, at_MCHW = kept(~wrong_M, walk.index_M, walk.clean_MCHW, walk.y_M, walk.at_MCHW)
    return _Walk(index_M, clean_MCHW, y_M, at_MCHW, _Verdict(*kept(~wrong_M, *walk.verdict)))


def _move_linf(walk: _Walk, ask: Oracle, move: _Move, side: int, budget: Budget) -> None:
    """Proposes one square at the ball's surface for each record (Algorithm 2), in place; the rejected are undone."""
    at_MCP, clean_MCP = walk.at_MCHW.flatten(2), walk.clean_MCHW.flatten(2)
    pixels_MCL = _pixels(move.corner_MK[:, 0], side, walk.at_MCHW)
    old_MCL, clean_MCL = at_MCP.gather(2, pixels_MCL), clean_MCP.gather(2, pixels_MCL)
    new_MCL = (clean_MCL + budget.radius * move.sign_MC[:, :, None]).clamp_(0.0, 1.0)
    # Of a square that is there already nothing could be learnt: it gets other signs, as in the authors' code.
    same_M11 = (new_MCL == old_MCL).flatten(1).all(dim=1)[:, None, None]
    sign_MC1 = move.sign_MC[:, :, None] * torch.where(same_M11, move.other_MC[:, :, None], 1.0)
    new_MCL = (clean_MCL + budget.radius * sign_MC1).clamp_(0.0, 1.0)
    at_MCP.scatter_(2, pixels_MCL, new_MCL)
    better_M11 = _accepted(walk, ask(walk.at_MCHW))
    at_MCP.scatter_(2, pixels_MCL, torch.where(better_M11, new_MCL, old_MCL))


def _move_l2(walk: _Walk, ask: Oracle, move: _Move, side: int, budget: Budget) -> None:
    """Proposes to move the length within two squares into a dipole in the first, for each record (Algorithm 3)."""
    first_MCL, second_MCL = (_pixels(corner_M, side, walk.at_MCHW) for corner_M in move.corner_MK.unbind(1))
    delta_MCP = (walk.at_MCHW - walk.clean_MCHW).flatten(2)
    length_M11 = torch.linalg.vector_norm(delta_MCP, dim=(1, 2), keepdim=True)
    old_MCL = delta_MCP.gather(2, first_MCL)
    old_MC1 = _length(old_MCL)
    delta_MCP.scatter_(2, first_MCL, 0.0)
    # The pixels that lie in both squares are 0 by now, so that they count once.
    free_MC1 = old_MC1.square() + _length(delta_MCP.gather(2, second_MCL)).square()
    delta_MCP.scatter_(2, second_MCL, 0.0)
    unused_M11 = (budget.radius**2 - length_M11.square()).clamp_(min=0.0) / delta_MCP.shape[1]
    tables_2L = _dipole(side).to(delta_MCP)
    new_MCL = tables_2L[move.other_MC[:, 0].long()][:, None, :] * move.sign_MC[:, :, None] + _unit(old_MCL, old_MC1)
    new_MCL = _unit(new_MCL, _length(new_MCL)) * (unused_M11 + free_MC1).sqrt()
    delta_MCP.scatter_(2, first_MCL, new_MCL)
    new_MCHW = _on_surface(walk.clean_MCHW, delta_MCP, budget)
    better_M11 = _accepted(walk, ask(new_MCHW))
    walk.at_MCHW = torch.where(better_M11[..., None], new_MCHW, walk.at_MCHW)


def _stripes(x_BCHW: Tensor, budget: Budget, draws: torch.Generator) -> Tensor:
    num_records, channels, _, width = x_BCHW.shape
    signs_BC1W = _signs((num_records, channels, 1, width), draws).to(x_BCHW)
    return (x_BCHW + budget.radius * signs_BC1W).clamp_(0.0, 1.0).contiguous()


def _dipoles(x_BCHW: Tensor, budget: Budget, draws: torch.Generator) -> Tensor:
    """Returns the first L2 images: dipoles of random sign and direction on a grid in the middle of the image."""
    num_records, channels, height, width = x_BCHW.shape
    side = max(1, min(height, width) // _TILES)
    rows, columns = height // side, width // side
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    signs_BCRS = _signs((num_records, channels, rows, columns), draws).to(x_BCHW)
    lying_BRS = (_uniform((num_records, rows, columns), draws) < 0.5).long().to(x_BCHW.device)
    tiles_BRSL = _dipole(side).to(x_BCHW)[lying_BRS]
    tiles_BCRSII = (tiles_BRSL[:, None] * signs_BCRS[..., None]).unflatten(-1, (side, side))
    delta_BCHW = torch.zeros_like(x_BCHW, memory_format=torch.contiguous_format)
    tiled_BCHW = tiles_BCRSII.permute(0, 1, 2, 4, 3, 5).reshape(num_records, channels, rows * side, columns * side)
    delta_BCHW[:, :, top : top + rows * side, left : left + columns * side] = tiled_BCHW
    return _on_surface(x_BCHW, delta_BCHW.flatten(2), budget)


def _on_surface(x_MCHW: Tensor, delta_MCP: Tensor, budget: Budget) -> Tensor:
    length_M11 = torch.linalg.vector_norm(delta_MCP, dim=(1, 2), keepdim=True)
    return (x_MCHW + (budget.radius * _unit(delta_MCP, length_M11)).unflatten(2, x_MCHW.shape[2:])).clamp_(0.0, 1.0)


@cache
def _dipole(side: int) -> Tensor:
    """Returns the dipole of a square of some pixels and its transpose, as two rows of side * side numbers, length 1.

    Upper half a pyramid, lower half one of the other sign, each of length 1 before they are joined: eta in the paper.
    """
    upper, lower = _pyramid(side // 2, side), _pyramid(side - side // 2, side)
    dipole = torch.cat([upper, -lower])
    dipole /= torch.linalg.vector_norm(dipole)
    return torch.stack([dipole.flatten(), dipole.T.flatten()])


def _pyramid(height: int, width: int) -> Tensor:
    """Returns the sum over k from m to n of 1 / (k + 1)^2: m is a pixel's distance from the middle, n the largest."""
    if height == 0:
        return torch.zeros(0, width, dtype=torch.float64)
    down_H1 = (torch.arange(height) - height // 2).abs()[:, None]
    across_1W = (torch.arange(width) - width // 2).abs()[None, :]
    terms_N = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** -2
    sums_N = terms_N.flip(0).cumsum(0).flip(0)
    pyramid_HW = sums_N[torch.maximum(down_H1, across_1W)]
    return pyramid_HW / torch.linalg.vector_norm(pyramid_HW)


def _sides(queries: int, first_share: float, budget: Budget, size: Sequence[int]) -> list[int]:
    """Returns the side of the square for every proposal, in pixels."""
    sides = []
    for step in range(queries - 2):
        share = first_share / 2 ** bisect_left(HALVINGS, int(step / queries * 10_000))
        side = max(1, round(math.sqrt(share * size[0] * size[1])))
        if budget.norm == "l2":  # odd and at least 3: a dipole needs two halves
            side = max(3, side + 1 - side % 2)
        sides.append(min(side, *size))
    return sides


def _moves(x_BCHW: Tensor, sides: list[int], budget: Budget, draws: torch.Generator) -> Iterator[tuple[int, _Move]]:
    """Yields the side and the draws of every proposal, for all records whoever still stands; many are drawn at once."""
    for start in range(0, len(sides), _DRAWN):
        drawn = _draw(x_BCHW, sides[start : start + _DRAWN], budget, draws)
        for step, side in enumerate(sides[start : start + _DRAWN]):
            yield side, _Move(*(numbers_TB[step] for numbers_TB in drawn))


def _draw(x_BCHW: Tensor, sides: list[int], budget: Budget, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the fields of `_Move` for T proposals, shapes (T, B, K), (T, B, C) and (T, B, C or 1)."""
    num_records, channels, height, width = x_BCHW.shape
    shape, squares = (len(sides), num_records), 1 if budget.norm == "linf" else 2
    side_T11 = torch.tensor(sides, device=draws.device)[:, None, None]
    row_TBK = (_uniform((*shape, squares), draws) * (height - side_T11 + 1)).long()
    column_TBK = (_uniform((*shape, squares), draws) * (width - side_T11 + 1)).long()
    sign_TBC = _signs((*shape, channels), draws)
    if budget.norm == "linf":  # any set of channels but the empty one, all equally likely
        subset_TB1 = torch.randint(1, 2 ** min(channels, 62), (*shape, 1), generator=draws, device=draws.device)
        bit_C = torch.arange(channels, device=draws.device).clamp_(max=62)
        other_TBC = 1.0 - 2.0 * (subset_TB1 >> bit_C & 1)
    else:
        other_TBC = (_uniform((*shape, 1), draws) < 0.5).float()
    corner_TBK = row_TBK * width + column_TBK
    return corner_TBK.to(x_BCHW.device), sign_TBC.to(x_BCHW), other_TBC.to(x_BCHW)


def _pixels(corner_M: Tensor, side: int, at_MCHW: Tensor) -> Tensor:
    """Returns the positions of the pixels of squares, counted row by row, shape (M, C, side * side)."""
    reach = torch.arange(side, device=at_MCHW.device)
    offsets_L = (reach[:, None] * at_MCHW.shape[3] + reach).flatten()
    return (corner_M[:, None] + offsets_L)[:, None, :].expand(-1, at_MCHW.shape[1], -1)


def _length(delta_MCL: Tensor) -> Tensor:
    return torch.linalg.vector_norm(delta_MCL, dim=2, keepdim=True)


def _unit(delta: Tensor, length: Tensor) -> Tensor:
    """Returns a perturbation over its length; one without a length stays 0."""
    return delta / length.clamp(min=torch.finfo(length.dtype).tiny)


def _uniform(shape: tuple[int, ...], draws: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=draws, device=draws.device)


def _signs(shape: tuple[int, ...], draws: torch.Generator) -> Tensor:
    return 1.0 - 2.0 * (_uniform(shape, draws) < 0.5)
