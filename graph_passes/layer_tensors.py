"""The tensors of a rewritten layer, made when they are written."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import numpy as np
import onnx_ir as ir

Arrays = Mapping[str, np.ndarray]


class LatestArrays:
    """The arrays that were made last, so that what comes from one piece of work is not made again for each of its parts.

    A writer asks for the tensors of a layer one after another, and never for two layers at once: no more than one layer's
    are in memory.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Arrays] = {}
        self._layer: Hashable = None

    def get(self, layer: Hashable, part: str, make: Callable[[], Arrays]) -> Arrays:
        """What `make` gives for a part of a layer; the arrays of all other layers are let go."""
        if layer != self._layer:
            self._layer, self._made = layer, {}
        if part not in self._made:
            made = make()
            if layer != self._layer:  # it took the weights of another layer, which this one shares
                self._layer, self._made = layer, {}
            self._made[part] = made
        return self._made[part]

    def tensor(
        self, layer: str, part: str, name: str, shape: tuple[int, ...], dtype: ir.DataType, make: Callable[[], Arrays]
    ) -> ir.LazyTensor:
        """One of the arrays as a constant that is made when it is read.

        Args:
            name: of the array in what `make` returns; the constant is called `{layer}.{name}`.
        """
        full = f"{layer}.{name}"

        def evaluate() -> ir.TensorProtocol:
            return ir.Tensor(np.ascontiguousarray(self.get(layer, part, make)[name]), name=full)

        return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=full)
