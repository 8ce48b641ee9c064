"""What malicious clients send in place of honest updates: functions of the updates that they know."""

from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

#: Along which the updates of MinMax, MinSum and the adaptive attacker leave the mean.
Direction = Literal["unit", "std", "sign"]


def gaussian(own_MP: Tensor, scale: float, draws: torch.Generator) -> Tensor:
    """Returns noise in place of the updates, of `scale` times their expected length.

    References: Blanchard et al. (2017), section 5.1.
    """
    noise_MP = torch.randn(own_MP.shape, generator=draws, device=draws.device).to(own_MP)
    lengths_M = torch.linalg.vector_norm(own_MP, dim=1, keepdim=True)
    return scale * lengths_M * noise_MP / own_MP.shape[1] ** 0.5


def alie(known_NP: Tensor, num_clients: int, num_malicious: int, z: float | None = None) -> Tensor:
    """Returns an update that lies z standard deviations from the mean in every coordinate: "a little is enough".

    References: Baruch et al. (2019), Algorithm 3.

    Args:
        known_NP: Updates from which mean and standard deviation are estimated.
        num_clients: Of the round.
        num_malicious: Of them.
        z: None: the paper's, see `alie_z`.
    """
    z = alie_z(num_clients, num_malicious) if z is None else z
    return known_NP.mean(0) - z * known_NP.std(0, correction=0)


def alie_z(num_clients: int, num_malicious: int) -> float:
    """Returns how far out an update may lie so that enough honest ones lie farther out, in standard deviations.

    At least 0: with few attackers the paper's number is none that would do harm.
    """
    supporters = num_clients // 2 + 1 - num_malicious
    honest = num_clients - num_malicious
    share = (honest - supporters) / honest if honest else 0.0
    return max(0.0, NormalDist().inv_cdf(share)) if 0 < share < 1 else 0.0


def inner_product(known_NP: Tensor, scale: float) -> Tensor:
    """Returns the negative mean times a factor, so that the aggregate's inner product with the true mean turns.

    Against the mean of all it does for a scale above (n - f) / f; against rules that choose, small ones do.

    References: Xie et al. (2020), section 4.
    """
    return -scale * known_NP.mean(0)


def min_max(known_NP: Tensor, direction: Direction, stretch: float = 1.0) -> Tensor:
    """Returns the update farthest along a direction that is no farther from any known one than they are from another.

    The largest step has a closed form; the paper halves and doubles.

    References: Shejwalkar and Houmansadr (2021), section 4.4.2 (AGR-agnostic Min-Max).

    Args:
        known_NP: Updates among which it hides.
        direction: Along which it leaves their mean.
        stretch: How many times as far from them it may be, at least 1; the paper's is 1.
    """
    mean_P, away_P = known_NP.mean(0), direction_of(known_NP, direction)
    gaps_NP = mean_P - known_NP
    most = (stretch * torch.cdist(known_NP.double(), known_NP.double()).max()).square()
    # |gap_i + step away|^2 <= most for every i.
    along_N, squares_N = (gaps_NP @ away_P).double(), gaps_NP.double().square().sum(1)
    length = away_P.double().square().sum()
    steps_N = (-along_N + (along_N.square() - length * (squares_N - most)).clamp(min=0).sqrt()) / length
    return mean_P + _finite(steps_N.min()) * away_P


def min_sum(known_NP: Tensor, direction: Direction, stretch: float = 1.0) -> Tensor:
    """Returns the update farthest along a direction whose squared distances sum to no more than a known one's do.

    References: Shejwalkar and Houmansadr (2021), section 4.4.3 (AGR-agnostic Min-Sum).

    Args:
        known_NP: Updates among which it hides.
        direction: Along which it leaves their mean.
        stretch: The root of the sum may be that many times as large, at least 1; the paper's is 1.
    """
    mean_P, away_P = known_NP.mean(0), direction_of(known_NP, direction)
    distances_NN = torch.cdist(known_NP.double(), known_NP.double()).square()
    of_mean = (known_NP - mean_P).double().square().sum()
    # The gaps to the mean sum to zero, so that the sum of squares grows by n |step away|^2 alone.
    left = (stretch**2 * distances_NN.sum(1).max() - of_mean).clamp(min=0)
    step = (left / (len(known_NP) * away_P.double().square().sum())).sqrt()
    return mean_P + _finite(step) * away_P


def direction_of(known_NP: Tensor, direction: Direction) -> Tensor:
    """Returns the direction against the mean: itself at unit length, its signs, or the standard deviations."""
    mean_P = known_NP.mean(0)
    if direction == "sign":
        return -mean_P.sign()
    if direction == "std":
        return -known_NP.std(0, correction=0)
    return -torch.nn.functional.normalize(mean_P, dim=0)


def mimicked(honest_NP: Tensor, principal_P: Tensor) -> int:
    """Returns the position of the honest update that lies farthest along the direction in which they differ most.

    References: Karimireddy et al. (2022), section 3 and appendix B.1.
    """
    return int((honest_NP @ principal_P).abs().argmax())


def principal(honest_NP: Tensor, before_P: Tensor | None, num_before: int) -> Tensor:
    """Returns the direction in which honest updates differ most, over the rounds so far: one power step per round.

    The authors' own code centres on the mean of all rounds so far and stops looking after a warm-up; this centres on
    each round's and keeps looking, for who takes part may change.

    Args:
        honest_NP: This round's.
        before_P: The direction so far, or None in the first round.
        num_before: Rounds behind it.
    """
    centred_NP = honest_NP - honest_NP.mean(0)
    if before_P is None:
        # The leading right singular vector, from the small matrix of products.
        _, vectors_NN = torch.linalg.eigh((centred_NP @ centred_NP.T).double())
        return torch.nn.functional.normalize(vectors_NN[:, -1].to(centred_NP) @ centred_NP, dim=0)
    stretched_P = torch.nn.functional.normalize(centred_NP.T @ (centred_NP @ before_P), dim=0)
    mixed_P = (num_before * before_P + stretched_P) / (num_before + 1)
    return torch.nn.functional.normalize(mixed_P, dim=0)


def _finite(step: Tensor) -> float:
    """Returns a step length; of updates that do not differ there is none."""
    return float(step) if bool(step.isfinite()) else 0.0
