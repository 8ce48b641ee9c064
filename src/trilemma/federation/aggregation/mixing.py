"""What may be done with updates before a rule looks at them: mixtures that bring honest rows nearer to each other."""

import torch

from trilemma.federation.aggregation.updates import Updates


def nearest_neighbour_mixing(updates: Updates, num_byzantine: int) -> Updates:
    """Returns for each row the mean of the n - f rows nearest to it, itself included.

    Requirement: 2 f < n. Cost: one product of n x p by p x n. References: Allouah et al. (2023), Algorithm 2.
    """
    distances_KK = updates.squared_distances()
    nearest_KL = distances_KK.argsort(dim=1, stable=True)[:, : len(updates) - num_byzantine]
    mix_KK = torch.zeros_like(distances_KK).scatter_(1, nearest_KL, 1 / nearest_KL.shape[1])
    return updates.mixed(mix_KK)


def bucketing(updates: Updates, size: int, draws: torch.Generator) -> Updates:
    """Returns the means of buckets of rows, drawn at random; the last bucket may hold fewer.

    Of n rows with f attackers there are ceil(n / size), with f attackers at most.

    Cost: none. References: Karimireddy et al. (2022), Algorithm 1.
    """
    order_K = torch.randperm(len(updates), generator=draws, device=draws.device).to(updates.matrix_NP.device)
    buckets = order_K.split(size)
    mix_LK = torch.zeros(len(buckets), len(updates), dtype=torch.float64, device=updates.matrix_NP.device)
    for row, bucket in enumerate(buckets):
        mix_LK[row, bucket] = 1 / len(bucket)
    return updates.mixed(mix_LK)
