"""An FFN whose experts' weights are merged for a segment (arXiv 2405.03133), by verification's own path.

Notation: an FFN of f neurons in expert order has E experts of g = f / E; expert e is neurons e g .. (e + 1) g - 1. For a
segment with mean input m, a = softmax(router(m)) [E]; the merged FFN has w_in = sum_e a_e W_in[e] and
w_out = scale * sum_e a_e W_out[e].
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clada_export.op.reference import SparseFFNTensors, neuron_outputs
from clada_export.op.router import RouterModule
from graph_passes.op import SparseFFNAttributes
from graph_passes.router import Router


class MergedReference:
    """Runs the rows of a text through the whole FFN or through what its experts were merged to.

    Args:
        tensors: neurons in expert order.
        router: with output softmax and E scores.
    """

    def __init__(self, tensors: SparseFFNTensors, attributes: SparseFFNAttributes, router: Router) -> None:
        self._tensors, self._attributes, self._scale = tensors, attributes, router.scale
        self._shares = RouterModule(replace(router, scale=1.0))
        self.granule = tensors.w_in.shape[0] // router.granules
        """g: how many neurons a row of a merged FFN runs."""

    def merge(self, segment: Tensor) -> SparseFFNTensors:
        """The merged FFN, float32, of the FFN inputs [T, d] of a segment, T at least 1."""
        shares = self._shares(segment.float().mean(dim=0, keepdim=True)).flatten()

        def merged(value: Tensor) -> Tensor:
            experts = value.float().reshape(-1, self.granule, *value.shape[1:])
            mean: Tensor = torch.tensordot(shares, experts, dims=1)
            return mean

        whole = self._tensors
        return replace(
            whole,
            w_in=merged(whole.w_in),
            w_out=merged(whole.w_out) * self._scale,
            gate_bias=None if whole.gate_bias is None else merged(whole.gate_bias),
            up_bias=None if whole.up_bias is None else merged(whole.up_bias),
        )

    def run(self, x: Tensor, merged: SparseFFNTensors) -> Tensor:
        """y [T, d] float32 of the inputs x [T, d]."""
        hidden, _ = neuron_outputs(x, merged.w_in, merged, self._attributes)
        y = hidden @ merged.w_out
        return y if merged.down_bias is None else y + merged.down_bias.float()
