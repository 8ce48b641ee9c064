"""The boundary of a linearised model: which one is nearest, and the shortest way to it within [0, 1].

A boundary is a hyperplane of images x + delta with gap + <normal, delta> = 0; the gap is negative where the model is
still right.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.attacks.budget import Norm
from trilemma.attacks.evasion.frozen import logits_and_jacobian
from trilemma.models.classifier import Classifier

#: How far beyond the boundary to aim, in pixel units: an image on the boundary itself may be answered either way.
BEYOND = 1e-6
#: Each pass of the search for a step's length is exact but for pixels that reach 0 or 1 in it; few passes are needed.
MOST_PASSES = 100


class Boundary(NamedTuple):
    """One hyperplane for each record: gap + <normal, delta> = 0.

    Attributes:
        gap_B: A wrong logit minus the true one (and the lead), at the image.
        normal_BCHW: Its gradient there.
    """

    gap_B: Tensor
    normal_BCHW: Tensor

    def seen_from(self, x_BCHW: Tensor, other_BCHW: Tensor) -> "Boundary":
        """Returns the same hyperplanes with the gaps at other images than `x_BCHW`, where they were made."""
        gap_B = self.gap_B + (self.normal_BCHW * (other_BCHW - x_BCHW)).sum(dim=(1, 2, 3))
        return Boundary(gap_B, self.normal_BCHW)


def nearest_boundary(
    classifier: Classifier, x_BCHW: Tensor, y_B: Tensor, classes_BT: Tensor, lead_B: Tensor, norm: Norm
) -> Boundary:
    """Returns of several wrong classes' boundaries, linearised at the image, the nearest in a norm.

    One forward pass and T backward passes; call it within `frozen`. How near a boundary is, is measured without
    regard to [0, 1], as Moosavi-Dezfooli et al. (2016, section 3) and Croce and Hein (2020b) do.

    Args:
        classifier: The classifier under attack.
        x_BCHW: Images in [0, 1].
        y_B: True labels.
        classes_BT: The wrong classes to choose from, for each record.
        lead_B: By how much a wrong logit has to exceed the true one.
        norm: In which norm a perturbation is measured.
    """
    logits_BK, jacobian_BTCHW = logits_and_jacobian(
        classifier, x_BCHW, lambda z: z.gather(1, classes_BT) - z.gather(1, y_B[:, None])
    )
    gap_BT = logits_BK.gather(1, classes_BT) - logits_BK.gather(1, y_B[:, None]) - lead_B[:, None]
    jacobian_BTCHW = jacobian_BTCHW.nan_to_num(nan=0.0)
    # The dual norm: of all steps of length 1, the best one changes the gap by so much.
    slope_BT = torch.linalg.vector_norm(jacobian_BTCHW, ord=1 if norm == "linf" else 2, dim=(2, 3, 4))
    far_BT = gap_BT.abs() / slope_BT.clamp(min=torch.finfo(slope_BT.dtype).tiny)
    chosen_B1 = far_BT.nan_to_num(nan=torch.inf).argmin(dim=1, keepdim=True)
    rows_B = torch.arange(len(y_B), device=y_B.device)
    gap_B1 = (gap_BT - BEYOND * slope_BT).gather(1, chosen_B1)
    return Boundary(gap_B1.squeeze(1), jacobian_BTCHW[rows_B, chosen_B1.squeeze(1)])


def linear_step(boundary: Boundary, norm: Norm) -> Tensor:
    """Returns the shortest perturbation that reaches the hyperplane, whether it leaves [0, 1] or not.

    A normal of zero gives no step. Every pixel's step is at most 1 long, which crosses [0, 1].

    References: Moosavi-Dezfooli et al. (2016), Algorithm 2 and, for L-infinity, section 3.3.

    Args:
        boundary: The hyperplanes.
        norm: In which norm the perturbation is shortest.
    """
    need_B1, signed_BN = _scaled(boundary)
    rate_BN = signed_BN.sign() if norm == "linf" else signed_BN
    slope_B1 = (signed_BN * rate_BN).sum(dim=1, keepdim=True).clamp(min=torch.finfo(signed_BN.dtype).tiny)
    t_B1 = (need_B1 / slope_B1).clamp(max=_huge(need_B1))
    return (t_B1 * rate_BN).clamp_(-1.0, 1.0).view_as(boundary.normal_BCHW)


def step_to_boundary(x_BCHW: Tensor, boundary: Boundary, norm: Norm) -> Tensor:
    """Returns the shortest perturbation that reaches the hyperplane without leaving [0, 1].

    Every pixel moves along the normal, by t for L-infinity or by t times its share of the normal for L2, until it is
    at 0 or 1; t is such that the hyperplane is reached. The way to it is concave and piecewise linear in t, so
    Newton's method climbs to the answer in a few passes without sorting, and is exact once no further pixel is at its
    end. Where the hyperplane does not meet [0, 1] the result is the corner nearest to it; a normal of zero gives no
    step, and so does a gap that is not a number.

    References: Croce and Hein (2020b), section 2 (the projection; there by sorting).

    Args:
        x_BCHW: Images in [0, 1].
        boundary: The hyperplanes; gaps at these images.
        norm: In which norm the perturbation is shortest.
    """
    need_B1, signed_BN = _scaled(boundary)
    x_BN = x_BCHW.flatten(1)
    weight_BN = signed_BN.abs()
    room_BN = torch.where(signed_BN > 0, 1.0 - x_BN, x_BN)
    rate_BN = torch.ones_like(weight_BN) if norm == "linf" else weight_BN
    t_B1 = _reach(need_B1, weight_BN, rate_BN, room_BN)
    return (torch.minimum(t_B1 * rate_BN, room_BN) * signed_BN.sign()).view_as(x_BCHW)


def _scaled(boundary: Boundary) -> tuple[Tensor, Tensor]:
    """Returns how far <signed, delta> has to rise, (B, 1), and `signed`, the normal or its opposite, (B, N).

    Scaled to a largest entry of 1: the squares of a vanishing gradient underflow.
    """
    normal_BN = boundary.normal_BCHW.flatten(1)
    largest_B1 = normal_BN.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(normal_BN.dtype).tiny)
    gap_B1 = (boundary.gap_B[:, None] / largest_B1).nan_to_num(nan=0.0)
    return gap_B1.abs(), normal_BN / largest_B1 * -gap_B1.sign()


def _huge(like_B1: Tensor) -> float:
    return torch.finfo(like_B1.dtype).max ** 0.5


def _reach(need_B1: Tensor, weight_BN: Tensor, rate_BN: Tensor, room_BN: Tensor) -> Tensor:
    """Returns the t at which sum(weight * min(t * rate, room)) is as large as needed, or a huge one if it never is."""
    slope_BN, most_BN = weight_BN * rate_BN, weight_BN * room_BN
    tiny, huge = torch.finfo(need_B1.dtype).tiny, _huge(need_B1)
    t_B1 = (need_B1 / slope_BN.sum(dim=1, keepdim=True).clamp(min=tiny)).clamp(max=huge)
    for _ in range(MOST_PASSES):
        full_BN = t_B1 * rate_BN >= room_BN
        left_B1 = need_B1 - most_BN.where(full_BN, 0.0).sum(dim=1, keepdim=True)
        further_B1 = left_B1 / slope_BN.masked_fill(full_BN, 0.0).sum(dim=1, keepdim=True).clamp(min=tiny)
        # Rounding must not send it back and forth.
        further_B1 = torch.maximum(t_B1, further_B1.clamp(max=huge))
        if torch.equal(further_B1, t_B1):
            break
        t_B1 = further_B1
    return t_B1
