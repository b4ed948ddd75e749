"""`QuantStore`: a model's matrices in one form, for the model computed with them and for the graph that is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch

from clada_export.plan.weights_form import KINDS, WeightsForm
from clada_export.quantise.codes import Coded, Codes
from clada_export.quantise.matrices import ModelMatrices, ModelMatrix
from graph_passes.quant.contract import BLOCK, TILE_ROWS
from graph_passes.quant.layout import QuantisedMatrix
from graph_passes.quant.op import ContractError, record_bytes
from graph_passes.quant.quantiser import QuantFormat


class QuantStore:
    """The codes of a model in one form. It is a `graph_passes.quant.quantiser.Quantiser`.

    Args:
        codes: of the model, which stores of several forms may share.
    """

    def __init__(self, codes: Codes, form: WeightsForm) -> None:
        self.codes, self.weights = codes, form
        self._starts: dict[bytes, list[str]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The paths of the modules whose matrices are quantised."""
        return tuple(self.codes.matrices.found)

    def coded(self, name: str) -> Coded:
        """The codes of a module's matrix. A table of tokens that is the head's matrix has the head's codes."""
        return self.codes.of(self._owner(name), self.coded_bits(name))

    def make(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Make all codes now.

        Args:
            progress: called with (matrices done, matrices in all).
        """
        for done, name in enumerate(self.names):
            self.coded(name)
            progress(done + 1, len(self.names))

    def form(self, name: str) -> QuantFormat | None:
        """See `Quantiser.form`. A name that the model does not have is a product that a fusion made of several."""
        matrices = self.codes.matrices
        path = matrices.parts[name].matrix if name in matrices.parts else name
        if path in matrices.found:
            return QuantFormat(self.coded_bits(path))
        return None if ":" in name else QuantFormat(self.weights.attention)

    def coded_bits(self, name: str) -> int:
        """Of the codes of a module's matrix, which need not be made yet."""
        return self.weights.bits(self.codes.matrices.found[self._owner(name)].kind)

    def matrix(self, name: str, weight: np.ndarray) -> QuantisedMatrix:
        """See `Quantiser.matrix`.

        A matrix that the model does not have under this name is put together of those whose numbers its rows are.

        Raises:
            ContractError: the model does not have such a matrix.
        """
        matrices = self.codes.matrices
        if name in matrices.parts:
            part = matrices.parts[name]
            coded = self.coded(part.matrix).of_rows(part.of)
        elif name in matrices.found:
            coded = self.coded(name)
        else:
            found = [self.coded(path) for path in self._pieces(name, weight)]
            if len({item.bits for item in found}) > 1:
                raise ContractError(f"{name!r} is made of matrices of different bits")
            coded = Coded(torch.cat([item.q for item in found]), torch.cat([item.scale for item in found]), found[0].bits)
        if tuple(coded.q.shape) != weight.shape:
            raise ContractError(f"{name!r} is {list(weight.shape)} in the graph and {list(coded.q.shape)} in the model")
        return coded.matrix()

    def sizes(self) -> dict[str, dict[str, int]]:
        """See `matrix_sizes`."""
        return matrix_sizes(self.codes.matrices, self.weights)

    @cached_property
    def digest(self) -> str:
        """The sha256 of all codes and scales; all are made for it."""
        found = hashlib.sha256()
        for name in self.names:
            coded = self.coded(name)
            found.update(f"{name} {coded.bits}".encode())
            for values in (coded.q, coded.scale):
                found.update(values.contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def _owner(self, name: str) -> str:
        tied = self.codes.matrices.tied
        return tied[1] if tied is not None and name == tied[0] else name

    def _pieces(self, name: str, weight: np.ndarray) -> Iterator[str]:
        """The modules whose matrices a packed one consists of, in order."""
        found = self.codes.matrices.found
        if self._starts is None:
            self._starts = {}
            for path, matrix in found.items():
                self._starts.setdefault(_key(matrix.rows()[0].numpy()), []).append(path)
        start = 0
        while start < len(weight):
            for path in self._starts.get(_key(weight[start]), ()):
                rows = found[path].rows()
                if np.array_equal(weight[start : start + len(rows)], rows.numpy()):
                    break
            else:
                raise ContractError(f"rows {start} and on of {name!r} are those of no matrix of the model")
            yield path
            start += len(rows)


def matrix_sizes(matrices: ModelMatrices, form: WeightsForm) -> dict[str, dict[str, int]]:
    """For each kind of matrix `bits`, how many `matrices`, and the `bytes` of their records; a tied table has none."""
    found: dict[str, dict[str, int]] = {}
    for kind in KINDS:
        chosen = [item for item in matrices.found.values() if item.kind == kind]
        if not chosen:
            continue
        tied = matrices.tied is not None and kind == "embedding"
        bits = form.head if tied else form.bits(kind)
        total = 0 if tied else sum(_record_bytes(item, bits) for item in chosen)
        found[kind] = {"bits": bits, "matrices": len(chosen), "bytes": total}
    return found


def _key(row: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(row, dtype=np.float32).tobytes()).digest()


def _record_bytes(matrix: ModelMatrix, bits: int) -> int:
    rows, columns = matrix.rows().shape
    return -(-rows // TILE_ROWS) * (columns // BLOCK) * record_bytes(bits, False)
