"""An attacker who knows the server's rule: it asks the rule itself which update does most harm."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trilemma.attacks.poisoning.updates import Direction, direction_of

#: Lengths that are tried, in units of the mean's, spaced by equal factors.
SHORTEST, LONGEST, LENGTHS = 0.05, 100.0, 12

DIRECTIONS: tuple[Direction, ...] = ("unit", "std", "sign")


def adaptive(known_NP: Tensor, aggregate: Callable[[Tensor], Tensor], num_honest: int, num_malicious: int) -> Tensor:
    """Returns the update that pulls the server's result farthest back along the mean of the known ones.

    Steps of many lengths from the mean, along each direction that leads away from it, are handed to the rule as it
    stands, beside the known updates: clipping to a norm, weights, what it remembers and what the server would not let
    in are part of it. The one after which the result has the smallest inner product with the mean is sent by all.

    Cost: 37 calls of the rule.

    References: Fang et al. (2020), section 4 (the directed deviation); Shejwalkar and Houmansadr (2021), section 4.3
    (tailored to the rule, by search).

    Args:
        known_NP: Updates that stand for the honest ones; where they are fewer, each stands for several.
        aggregate: updates_KP -> update_P, the malicious rows last.
        num_honest: Rows of the honest clients.
        num_malicious: Rows that are theirs.
    """
    mean_P = known_NP.mean(0)
    towards_P = torch.nn.functional.normalize(mean_P, dim=0)
    length = float(torch.linalg.vector_norm(mean_P))
    if length == 0:
        return mean_P
    honest_NP = known_NP[torch.arange(num_honest, device=known_NP.device) % len(known_NP)]
    best_P, least = mean_P, float(aggregate(_beside(honest_NP, mean_P, num_malicious)) @ towards_P)
    for direction in DIRECTIONS:
        away_P = torch.nn.functional.normalize(direction_of(known_NP, direction), dim=0)
        for factor in np.geomspace(SHORTEST, LONGEST, LENGTHS).tolist():
            sent_P = mean_P + factor * length * away_P
            result_P = aggregate(_beside(honest_NP, sent_P, num_malicious))
            pulled = float(result_P @ towards_P)
            if pulled < least:
                best_P, least = sent_P, pulled
    return best_P


def _beside(honest_NP: Tensor, sent_P: Tensor, num_malicious: int) -> Tensor:
    return torch.cat([honest_NP, sent_P.expand(num_malicious, -1)])
