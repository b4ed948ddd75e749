"""Codes of a model's matrices, made once for each number of bits and kept in a file without a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.spool import Spool
from clada_export.errors import UnsupportedModelError
from clada_export.quantise.matrices import ModelMatrices, ModelMatrix
from graph_passes.quant.contract import BLOCK
from graph_passes.quant.layout import QuantisedMatrix
from graph_passes.quant.op import ContractError
from graph_passes.quant.quantise import quantise

Rounder = Callable[[ModelMatrix, np.ndarray, int, int], QuantisedMatrix]
"""Chooses the codes of a matrix: called with the matrix, its float32 numbers [rows, columns], the bits and the threads. It may
know what the model's inputs are like; the codes of a row may not depend on other rows."""


def search_scales(matrix: ModelMatrix, weight: np.ndarray, bits: int, threads: int) -> QuantisedMatrix:
    """The nearest codes for scales that are searched for, block by block."""
    return quantise(weight, bits, search=True, threads=threads)


@dataclass(frozen=True)
class Coded:
    """A matrix in codes: weight [n, k] is `scale[n, k // 32] * q[n, k]`.

    Attributes:
        q: int8 [rows, columns], the code less the code of 0.
        scale: float16 [rows, columns / 32].
        bits: of a code.
    """

    q: Tensor
    scale: Tensor
    bits: int

    def decoded(self, rows: slice = slice(None)) -> Tensor:
        """What it stands for, a new float32 [rows, columns]."""
        q, scale = self.q[rows], self.scale[rows]
        return q.float().view(*scale.shape, BLOCK).mul_(scale.float().unsqueeze(-1)).view(q.shape)

    def of_rows(self, choose: Callable[[Tensor], Tensor]) -> Coded:
        """Some of its rows."""
        return Coded(choose(self.q), choose(self.scale), self.bits)

    def matrix(self) -> QuantisedMatrix:
        """As what writes a graph takes it; a copy."""
        codes = self.q.numpy().astype(np.int16)
        codes += 1 << (self.bits - 1)
        return QuantisedMatrix(codes.astype(np.uint8), np.ascontiguousarray(self.scale.numpy()), self.bits)


class Codes:
    """The codes of all matrices of a decoder, each made when it is first asked for.

    Args:
        decoder: its weights may not change while these are used.
        rounder: chooses codes.
        threads: that make them; as many as PyTorch uses by default.
    """

    def __init__(
        self, decoder: Decoder, matrices: ModelMatrices, rounder: Rounder = search_scales, threads: int | None = None
    ) -> None:
        self.matrices = matrices
        self._decoder, self._rounder = decoder, rounder
        self._threads = threads or torch.get_num_threads()
        self._made: dict[tuple[str, int], Coded] = {}
        self._spool = Spool()

    def of(self, name: str, bits: int) -> Coded:
        """Of a matrix, by the path of its module.

        Raises:
            UnsupportedModelError: a weight that is not finite; names it.
            UsageError: there is no room on the disk for the codes.
        """
        if (name, bits) not in self._made:
            matrix = self.matrices.found[name]
            rows = matrix.rows()
            try:
                made = self._rounder(matrix, rows.numpy(), bits, self._threads)
            except ContractError as error:
                raise UnsupportedModelError(f"{name}: {error}") from error
            finally:
                self._decoder.used(rows)
            self.keep(name, made)
        return self._made[name, bits]

    def keep(self, name: str, made: QuantisedMatrix) -> None:
        """Take the codes of a matrix that were made elsewhere, in place of those that there may be.

        Raises:
            UsageError: there is no room on the disk for the codes.
        """
        q = torch.from_numpy(made.codes).to(torch.int16).sub_(1 << (made.bits - 1))
        kept = self._spool.copy(q, torch.int8), self._spool.copy(torch.from_numpy(made.scale))
        self._made[name, made.bits] = Coded(*kept, made.bits)
