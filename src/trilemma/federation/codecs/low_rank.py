"""Low-rank approximation of an update, matrix by matrix (PowerSGD, Vogels et al. 2019)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def matrices(shapes: Sequence[Sequence[int]], rank: int) -> list[tuple[int, int] | None]:
    """Returns for each parameter the rows and columns it is approximated with, or None where it is sent as it is.

    That is a vector, or a matrix whose factors would not be smaller than itself.
    """
    found: list[tuple[int, int] | None] = []
    for shape in shapes:
        size = torch.Size(shape)
        rows, columns = (size[0], size[1:].numel()) if len(size) > 1 else (0, 0)
        found.append((rows, columns) if rank * (rows + columns) < rows * columns else None)
    return found


def factors(matrix_RC: Tensor, start_Ck: Tensor) -> tuple[Tensor, Tensor]:
    """Returns P (R, k) with orthonormal columns and Q (C, k) so that P Q^T is near the matrix: one step of iteration.

    The product is the matrix's projection onto the columns of P, so that it is no longer than the matrix, and no
    farther from it than zero is.

    References: Vogels et al. (2019), Algorithm 1, for one worker.

    Args:
        matrix_RC: What is approximated.
        start_Ck: The last round's Q, or noise.
    """
    orthonormal_Rk, _ = torch.linalg.qr(matrix_RC @ start_Ck)
    return orthonormal_Rk, matrix_RC.T @ orthonormal_Rk
