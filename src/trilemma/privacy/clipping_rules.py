"""How a gradient, or a whole update, is bounded: factors that depend on its own norms and on nothing else.

A clipper divides the flat vector of trainable parameters into G groups and gives each row a factor for each group.
Sensitivity of every clipper here: the scaled row has norm at most `clip`, over all groups together, so adding or
removing one row moves a sum of scaled rows by at most `clip`. A row with a norm that is no finite number has nothing
that could be scaled: its factors are 0, and whoever sums must leave it out (0 times infinity is not 0).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trilemma.models.classifier import Classifier
from trilemma.models.vector import num_params

#: A norm of 0 stays 0: the tiny floor only avoids 0 / 0.
_FLOOR = 1e-12


@dataclass(frozen=True)
class Flat:
    """Scales the whole row to norm `clip` at most (Abadi et al. 2016, Algorithm 1).

    Attributes:
        clip: Largest norm of a scaled row; infinity does not clip.
    """

    clip: float

    def group_sizes(self, classifier: Classifier) -> tuple[int, ...]:
        """Returns the lengths of the groups along the flat vector: one group."""
        return (num_params(classifier),)

    def weights(self, norms_BG: Tensor) -> Tensor:
        """Returns min(1, clip / norm) of each row, shape (B, 1)."""
        return _sound(norms_BG, (self.clip / norms_BG.clamp_min(_FLOOR)).clamp(max=1.0))


@dataclass(frozen=True)
class PerLayer:
    """Scales each layer's part of a row to norm clip / sqrt(G) at most, so that the whole has norm `clip` at most.

    A group is a module with trainable parameters of its own, such as a convolution's weight and bias. A large
    gradient in one layer then takes nothing from the others.

    References: McMahan et al. (2018), section 3.2, "per-layer clipping".

    Attributes:
        clip: Largest norm of a scaled row over all groups; infinity does not clip.
    """

    clip: float

    def group_sizes(self, classifier: Classifier) -> tuple[int, ...]:
        """Returns the lengths of the groups along the flat vector, one for each module, in its order."""
        sizes: dict[str, int] = {}
        for name, parameter in classifier.named_parameters():
            if parameter.requires_grad:
                layer = name.rpartition(".")[0]
                sizes[layer] = sizes.get(layer, 0) + parameter.numel()
        return tuple(sizes.values())

    def weights(self, norms_BG: Tensor) -> Tensor:
        """Returns min(1, clip / (sqrt(G) norm)) of each row and group, shape (B, G)."""
        share = self.clip / norms_BG.shape[1] ** 0.5
        return _sound(norms_BG, (share / norms_BG.clamp_min(_FLOOR)).clamp(max=1.0))


@dataclass(frozen=True)
class Automatic:
    """Scales every row to nearly norm `clip`, small ones up: what is left to choose is the learning rate.

    References: Bu et al. (2023), "Automatic clipping", equation 4 (AUTO-S).

    Attributes:
        clip: Norm that a scaled row approaches from below and never reaches.
        gamma: Added to the norm; keeps the length of small gradients distinguishable.
    """

    clip: float
    gamma: float = 0.01

    def group_sizes(self, classifier: Classifier) -> tuple[int, ...]:
        """Returns the lengths of the groups along the flat vector: one group."""
        return (num_params(classifier),)

    def weights(self, norms_BG: Tensor) -> Tensor:
        """Returns clip / (norm + gamma) of each row, shape (B, 1)."""
        return _sound(norms_BG, self.clip / (norms_BG + self.gamma))


Clipper = Flat | PerLayer | Automatic

#: Numbers whose squares are added up one after the other.
_PIECE = 1024


def total_norms(norms_BG: Tensor) -> Tensor:
    """Returns each row's norm over all groups, shape (B,)."""
    return norms_BG[:, 0] if norms_BG.shape[1] == 1 else norms_BG.square().sum(1).sqrt()


def row_norms(rows_NP: Tensor) -> Tensor:
    """Returns each row's norm, shape (N,), to a relative error of some 1e-7 at any length.

    torch's norm adds up the squares one after the other: of 11 million numbers it is off by 4e-4, and what was clipped
    by it is too long by as much. Norms of short pieces, whose squares torch's sum adds pairwise, are as fast.
    """
    whole = rows_NP.shape[1] // _PIECE * _PIECE
    pieces_NQ = torch.linalg.vector_norm(rows_NP[:, :whole].unflatten(1, (-1, _PIECE)), dim=2)
    return (pieces_NQ.square().sum(1) + rows_NP[:, whole:].square().sum(1)).sqrt()


def clipped_row_sum(rows_NP: Tensor, group_sizes: tuple[int, ...], clipper: Clipper) -> tuple[Tensor, Tensor]:
    """Returns the sum of scaled rows, shape (P,), and their groups' norms before, shape (N, G); no rows give zeros.

    Args:
        rows_NP: Whole updates, one of each client, or whole gradients, one of each unit.
        group_sizes: What the clipper says of the network that they belong to.
        clipper: Bounds each row.
    """
    parts = rows_NP.split(group_sizes, dim=1)
    norms_NG = torch.stack([row_norms(part) for part in parts], dim=1)
    weight_NG = clipper.weights(norms_NG)
    unsound_N1 = ~norms_NG.isfinite().all(1, keepdim=True)
    sums = [weight_NG[:, g] @ part.masked_fill(unsound_N1, 0.0) for g, part in enumerate(parts)]
    return torch.cat(sums), norms_NG


def _sound(norms_BG: Tensor, weight_BG: Tensor) -> Tensor:
    return torch.where(norms_BG.isfinite().all(1, keepdim=True), weight_BG, 0.0)
