"""What routers share that are one linear map with a gate for every expert, trained on the FFN's own error."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clada_export.methods.training.layer import ExpertLayer, Reconstruction
from clada_export.methods.training.train import RouterTask, input_size, linear_weight


class LinearGates(RouterTask):
    """Linear(d, E) on inputs of one size; its weights begin at a tenth of what `linear_weight` draws.

    A subclass names its `parameters`, the weight among them.
    """

    def __init__(self, layer: ExpertLayer, errors: Reconstruction, generator: torch.Generator) -> None:
        self._layer, self._errors = layer, errors
        self._size = input_size(layer.x)
        self._inputs = layer.x / self._size
        self._weight = linear_weight(layer.experts, layer.hidden_size, generator) * 0.1

    def _softmax(self, rows: Tensor) -> Tensor:
        """The gates [B, E] of rows int64 [B], which sum to 1."""
        return functional.linear(self._inputs[rows], self._weight).softmax(-1)
