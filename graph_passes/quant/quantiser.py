"""Who says how each matrix is quantised, and makes its codes: the same for a simulation and for the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from graph_passes.quant.layout import QuantisedMatrix
from graph_passes.quant.op import QuantMatMulAttributes
from graph_passes.quant.quantise import quantise


@dataclass(frozen=True)
class QuantFormat:
    """How a matrix is quantised: `bits` of a code, and whether there is an offset beside each scale.

    Raises:
        ContractError: bits that the op does not have.
    """

    bits: int = 8
    has_offset: bool = False

    def __post_init__(self) -> None:
        QuantMatMulAttributes(1, self.bits, self.has_offset)  # refuses other bits


FFN_ROLES = ("gate", "up", "down")


def ffn_matrix(ffn: str, role: str) -> str:
    """What a matrix of an FFN is called: its module's path may not be in the graph, where gate and up can be one product.

    Args:
        ffn: the module path of the down projection.
        role: one of `FFN_ROLES`.
    """
    return f"{ffn}:{role}"


class Quantiser(Protocol):
    """Says how a matrix is quantised.

    A matrix of an FFN is called by `ffn_matrix`, any other by the module path of its product (`lm_head`), or by its node's
    name where it has no path, as products that a fusion packed together. Rows are quantised one by one, so a part of a packed
    matrix has the codes that it has in the whole.
    """

    def form(self, name: str) -> QuantFormat | None:
        """How; None: it stays as it is."""
        ...

    def matrix(self, name: str, weight: npt.NDArray[np.float32]) -> QuantisedMatrix:
        """Quantise a matrix [out_features, in_features] as `form` says. The same name and numbers give the same codes.

        Raises:
            ContractError: a shape that blocks do not divide, or a number that is not finite; names the matrix.
        """
        ...


@dataclass(frozen=True)
class UniformQuantiser:
    """One form for all matrices.

    Args:
        format: of every matrix.
        search: try some scales a block and keep the best (`quantise`).
        threads: that quantise a matrix.
    """

    format: QuantFormat
    search: bool = False
    threads: int = 1

    def form(self, name: str) -> QuantFormat:
        """See `Quantiser.form`."""
        return self.format

    def matrix(self, name: str, weight: npt.NDArray[np.float32]) -> QuantisedMatrix:
        """See `Quantiser.matrix`."""
        form = self.format
        return quantise(weight, form.bits, has_offset=form.has_offset, search=self.search, threads=self.threads)
