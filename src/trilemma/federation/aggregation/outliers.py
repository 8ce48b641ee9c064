"""Rules that leave out, or hardly count, rows that stand out from the others or resemble each other too much."""

import torch
from torch import Tensor

from trilemma.federation.aggregation.updates import Updates

#: Numbers into which FoolsGold's memory of a client is folded: cosines of 65536 are right to about .004.
FOLDED = 2**16
#: Of more coordinates than this no order is drawn, which would take longer than the rule.
_PERMUTED = 2**17
_TINY = torch.finfo(torch.float64).tiny


def divide_and_conquer(
    updates: Updates,
    num_byzantine: int,
    draws: torch.Generator,
    *,
    num_coordinates: int = 10_000,
    rounds: int = 5,
    filter_factor: float = 1.0,
) -> Tensor:
    """Returns the mean of the rows that never lie far out along the direction in which rows differ most.

    What sticks out in a few of many coordinates is seen only in rounds that draw these; then a row that is huge there
    stays. Norms are for another stage: shorten the rows first where that can be.

    Requirement: 2 f < n. Cost: O(n c) for each round, c coordinates, and O(n p) once. References: Shejwalkar and
    Houmansadr (2021), Algorithm 2.

    Args:
        updates: The rows.
        num_byzantine: f.
        draws: Source of the coordinates.
        num_coordinates: Looked at in a round, at most.
        rounds: In each, `filter_factor` f rows are left out.
        filter_factor: The paper's c.
    """
    num_rows, num_parameters = len(updates), updates.matrix_NP.shape[1]
    num_left_out = min(num_rows - 1, round(filter_factor * num_byzantine))
    good_K = torch.ones(num_rows, dtype=torch.bool, device=updates.matrix_NP.device)
    for _ in range(rounds):
        index_C = _drawn(num_parameters, num_coordinates, draws)
        block_KC = updates.columns(index_C.to(updates.matrix_NP.device)).double()
        block_KC = block_KC - block_KC.mean(dim=0)
        # The left singular vectors are the eigenvectors of the small matrix of products.
        _, vectors_KK = torch.linalg.eigh(block_KC @ block_KC.T)
        outlying_K = vectors_KK[:, -1].square()
        good_K[outlying_K.argsort(descending=True, stable=True)[:num_left_out]] = False
    return updates.combined(good_K.double() / max(1, int(good_K.sum())))  # of none that are good, no move


def _drawn(num_parameters: int, most: int, draws: torch.Generator) -> Tensor:
    """Returns different coordinates, ascending; of many a few less than `most`, for some are drawn twice."""
    if num_parameters <= _PERMUTED:
        return torch.randperm(num_parameters, generator=draws, device=draws.device)[:most].sort().values
    return torch.randint(num_parameters, (most,), generator=draws, device=draws.device).unique()


def foolsgold(updates: Updates, histories_KF: Tensor) -> Tensor:
    """Returns the mean of the rows, of which those count least whose senders have always pushed alike.

    Sybils share an aim that honest clients with data of their own do not. It works against several attackers only, and
    on clients whose data differ.

    Cost: O(n p), and O(n n c) for the memory's c numbers. References: Fung et al. (2020), Algorithm 1, with kappa 1.

    Args:
        updates: The rows.
        histories_KF: Sum of all updates of each row's sender, this round's included; `folded` ones will do.
    """
    weights_K = foolsgold_weights(histories_KF)
    total = float(weights_K.sum())
    return updates.combined(weights_K / total if total > 0 else torch.zeros_like(weights_K))


def foolsgold_weights(histories_KF: Tensor) -> Tensor:
    """Returns the weight in [0, 1] that FoolsGold gives each sender; 0 to one whose history is not finite."""
    finite_K = histories_KF.isfinite().all(dim=1)
    rows_KF = torch.where(finite_K[:, None], histories_KF.double(), 0.0)
    rows_KF = rows_KF / torch.linalg.vector_norm(rows_KF, dim=1, keepdim=True).clamp(min=_TINY)
    cosine_KK = rows_KF @ rows_KF.T
    cosine_KK.fill_diagonal_(-1.0)
    most_K = cosine_KK.amax(dim=1)
    # Pardoning: a row that resembles one that resembles others more is likelier honest.
    pardon_KK = (most_K[:, None] / most_K[None, :]).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)
    milder_KK = torch.where(
        (most_K[:, None] < most_K[None, :]) & (most_K[None, :] > 0), cosine_KK * pardon_KK, cosine_KK
    )
    milder_KK.fill_diagonal_(-1.0)
    weights_K = (1 - milder_KK.amax(dim=1)).clamp(0.0, 1.0)
    weights_K = weights_K / weights_K.amax().clamp(min=_TINY)
    weights_K = weights_K.clamp(max=0.99)  # as the authors do before the logit
    logit_K = (weights_K / (1 - weights_K)).clamp(min=_TINY).log() + 0.5
    return torch.where(finite_K, logit_K.clamp(0.0, 1.0), 0.0)


def folded(updates: Updates) -> Tensor:
    """Returns the rows folded into few numbers each, (K, F), by sums with fixed random signs; inner products survive.

    A count sketch: what a client has sent over all rounds need not be kept in full. One pass.
    References: Charikar, Chen and Farach-Colton (2002).
    """
    device, num_parameters = updates.matrix_NP.device, updates.matrix_NP.shape[1]
    draws = torch.Generator().manual_seed(0)
    sign_P = (1.0 - 2.0 * torch.randint(2, (num_parameters,), generator=draws)).to(device)
    found_KF = _folded(updates, sign_P, torch.float32)
    return (found_KF if bool(found_KF.isfinite().all()) else _folded(updates, sign_P, torch.float64)).double()


def _folded(updates: Updates, sign_P: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the signed sums; a column's place is its number modulo FOLDED, for the signs alone do the work."""
    found_KF = torch.zeros(len(updates), FOLDED, dtype=dtype, device=sign_P.device)
    for columns, block_Kc in updates.blocks():
        start, done = columns.start, 0
        while done < block_Kc.shape[1]:
            place = (start + done) % FOLDED
            end = min(block_Kc.shape[1], done + FOLDED - place)
            part_Kc, signs_c = block_Kc[:, done:end].to(dtype), sign_P[start + done : start + end].to(dtype)
            found_KF[:, place : place + end - done].addcmul_(part_Kc, signs_c)
            done = end
    return found_KF
