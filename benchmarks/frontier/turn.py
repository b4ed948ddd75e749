"""An orthogonal change of the residual stream's basis, after which no weight lies on a quantisation grid."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.rotate import orthogonal


class Turn:
    """Takes rows [.., size] to another basis and back.

    Args:
        block: coordinates that are mixed with each other, a divisor of `size`: they are shuffled, and each block is multiplied
            by one random orthogonal matrix. `size` mixes all of them, at a cost that large models make felt.
    """

    def __init__(self, size: int, seed: int, block: int | None = None) -> None:
        self._matrix = orthogonal(block or size, seed).float()
        generator = torch.Generator().manual_seed(seed)
        self._order = None if block is None else torch.randperm(size, generator=generator)

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows in the new basis: the products with a turned weight's rows stay what they were."""
        if self._order is None:
            return rows @ self._matrix
        return self._blocks(rows[..., self._order], self._matrix)

    def back(self, rows: Tensor) -> Tensor:
        """The inverse."""
        if self._order is None:
            return rows @ self._matrix.t()
        return self._blocks(rows, self._matrix.t())[..., self._order.argsort()]

    @staticmethod
    def _blocks(rows: Tensor, matrix: Tensor) -> Tensor:
        return (rows.reshape(*rows.shape[:-1], -1, len(matrix)) @ matrix).view_as(rows)
