"""A round's updates as rules see them: rows of a matrix that is never copied as a whole.

Eleven million parameters of a hundred clients are gigabytes. Whatever a rule needs (norms, distances, a value for every
coordinate) is computed from some columns at a time, and mixtures of rows are kept as the small matrix that mixes them.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

#: Numbers that are held at a time beside the updates: few enough to stay in a processor's cache.
AT_A_TIME = 2**20

#: Squared distances below this share of the squared lengths are computed from differences: of a difference of squares
#: too few digits would be left.
TOO_CLOSE = 1e-2

#: Lengths below this are made of squares that float32 may not hold.
_SMALL = 1e-15


class Updates:
    """Some rows of parameters, perhaps mixed from others.

    Attributes:
        matrix_NP: What the clients sent, finite.
        mix_KN: The rows as mixtures of those, or None where they are those.
    """

    def __init__(self, matrix_NP: Tensor, mix_KN: Tensor | None = None):
        self.matrix_NP = matrix_NP
        self.mix_KN = mix_KN

    def __len__(self) -> int:
        return len(self.matrix_NP) if self.mix_KN is None else len(self.mix_KN)

    def mixed(self, mix_LK: Tensor) -> "Updates":
        """Returns mixtures of the rows; mix_LK holds their shares, and costs no pass over the updates."""
        mix_LK = mix_LK.to(torch.float64)
        return Updates(self.matrix_NP, mix_LK if self.mix_KN is None else mix_LK @ self.mix_KN)

    def squared_distances(self) -> Tensor:
        """Returns the squared distances of all pairs of rows, (K, K) in double precision.

        One matrix product of N x P by P x N. Where rows lie close to each other, for their length, the product is made
        again of the rows relative to the one of median length, which no distance depends on: what they have in common
        then costs no digits, and a row that is huge costs none of the others'.
        """
        distances_KK, lengths_KK = _distances(self.products())
        close_KK = (distances_KK < TOO_CLOSE * lengths_KK) | ~distances_KK.isfinite()
        if bool(close_KK.fill_diagonal_(False).any()):
            middle = int(self.norms().argsort(stable=True)[(len(self) - 1) // 2])
            distances_KK, _ = _distances(self._products(lambda block_Kc: block_Kc - block_Kc[middle]))
        distances_KK = distances_KK.nan_to_num(nan=torch.inf, posinf=torch.inf)  # of a row whose squares overflow
        return distances_KK.fill_diagonal_(0.0)

    def products(self) -> Tensor:
        """Returns the inner products of all pairs of rows, (K, K) in double precision: one matrix product."""
        return self._products(lambda block_Kc: block_Kc)

    def norms(self, origin_P: Tensor | None = None) -> Tensor:
        """Returns the lengths of the rows, or their distances from a point, (K,) in double precision: one pass.

        A second pass where a row lies close to the point, for its length.
        """
        if origin_P is None:
            return self._lengths(lambda _, block_Kc: block_Kc)
        norms_K, dots_K = self._norms_and_dots(origin_P)
        lengths_K = norms_K.square() + length(origin_P) ** 2
        distances_K = lengths_K - 2 * dots_K
        doubtful_K = ~distances_K.isfinite() | (distances_K < TOO_CLOSE * lengths_K) | (lengths_K < _SMALL**2)
        if bool(doubtful_K.any()):
            return self._lengths(lambda columns, block_Kc: block_Kc - origin_P[columns])
        return distances_K.sqrt()

    def norms_and_dots(self, point_P: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the lengths of the rows and their inner products with a point, (K,) in double precision: one pass.

        A second one for the products, in double precision throughout, where one overflows.
        """
        norms_K, dots_K = self._norms_and_dots(point_P)
        if not bool(dots_K.isfinite().all()):
            dots_K = torch.zeros_like(dots_K)
            for columns, block_Kc in self.blocks():
                dots_K += block_Kc.double() @ point_P[columns].double()
        return norms_K, dots_K

    def combined(self, weights_K: Tensor) -> Tensor:
        """Returns the sum of the rows times some weights, (P,): one pass."""
        weights_K = weights_K.to(torch.float64)
        weights_N = weights_K if self.mix_KN is None else weights_K @ self.mix_KN
        return weights_N.to(self.matrix_NP) @ self.matrix_NP

    def by_columns(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns what a function of some columns, (K, c) -> (c,), makes of all of them, (P,): one pass."""
        result_P = torch.empty_like(self.matrix_NP[0])
        for columns, block_Kc in self.blocks():
            result_P[columns] = function(block_Kc)
        return result_P

    def columns(self, index_C: Tensor) -> Tensor:
        """Returns some coordinates of all rows, (K, C)."""
        block_NC = self.matrix_NP[:, index_C]
        return block_NC if self.mix_KN is None else self.mix_KN.to(block_NC) @ block_NC

    def _norms_and_dots(self, point_P: Tensor) -> tuple[Tensor, Tensor]:
        squares_K, dots_K = torch.zeros(2, len(self), dtype=torch.float64, device=self.matrix_NP.device)
        for columns, block_Kc in self.blocks():
            squares_K += _lengths(block_Kc).square()
            dots_K += (block_Kc @ point_P[columns]).double()
        return squares_K.sqrt(), dots_K

    def _lengths(self, of_block: Callable[[slice, Tensor], Tensor]) -> Tensor:
        squares_K = torch.zeros(len(self), dtype=torch.float64, device=self.matrix_NP.device)
        for columns, block_Kc in self.blocks():
            squares_K += _lengths(of_block(columns, block_Kc)).square()
        return squares_K.sqrt()

    def _products(self, of_block: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the inner products of what is made of the rows; a quarter of the table is a mirror of another."""
        half = len(self) // 2
        products_KK = torch.zeros(len(self), len(self), dtype=torch.float64, device=self.matrix_NP.device)
        for _, block_Kc in self.blocks():
            block_Kc = of_block(block_Kc)
            products_KK[:half] += (block_Kc[:half] @ block_Kc.T).double()
            products_KK[half:, half:] += (block_Kc[half:] @ block_Kc[half:].T).double()
        products_KK[half:, :half] = products_KK[:half, half:].T
        return products_KK

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields some columns at a time with the rows there, (K, c)."""
        num_rows, num_columns = self.matrix_NP.shape
        width = max(1, AT_A_TIME // num_rows)
        for start in range(0, num_columns, width):
            columns = slice(start, start + width)
            block_Nc = self.matrix_NP[:, columns]
            yield columns, block_Nc if self.mix_KN is None else self.mix_KN.to(block_Nc) @ block_Nc


def length(point_P: Tensor) -> float:
    """Returns the length of one vector, in double precision, without a copy of it in that."""
    blocks = (_lengths(block_P[None]) for block_P in point_P.split(AT_A_TIME))
    return float(torch.cat([*blocks]).norm())


def _distances(products_KK: Tensor) -> tuple[Tensor, Tensor]:
    """Returns squared distances, at least 0, and the sums of the squared lengths that they are differences of."""
    squares_K = products_KK.diagonal()
    lengths_KK = squares_K[:, None] + squares_K[None, :]
    return (lengths_KK - 2 * products_KK).clamp(min=0.0), lengths_KK


def _lengths(block_Kc: Tensor) -> Tensor:
    """Returns the lengths of a block's rows in double precision; squares that leave float32's range are taken in it."""
    lengths_K = torch.linalg.vector_norm(block_Kc, dim=1)
    if bool((lengths_K.isfinite() & (lengths_K > _SMALL)).all()):
        return lengths_K.double()
    return torch.linalg.vector_norm(block_Kc.double(), dim=1)
