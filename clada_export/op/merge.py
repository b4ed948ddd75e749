"""An FFN whose experts' weights are merged into one smaller FFN for a segment, evaluated in PyTorch (arXiv 2405.03133).

It is what layers with segment state run, and that state is the smaller FFN.

Notation: an FFN of f neurons in expert order has E experts of g = f / E; expert e is neurons e g .. (e + 1) g - 1, and its
neuron j is merged with neuron j of every other expert.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clada_export.op.reference import SparseFFNTensors, neuron_outputs
from clada_export.op.router import RouterModule
from graph_passes.op import SparseFFNAttributes
from graph_passes.router import Router


class MergingFFN:
    """Merges an FFN's experts for a segment, and runs what comes out.

    w_in = sum_e a_e W_in[e] and w_out = scale * sum_e a_e W_out[e], where a = softmax of the router on the mean FFN input of
    the segment, and scale is the router's. The paper's weights sum to 1 too; there an expert is an FFN of its own, here it is a
    part of one, which is why the output has a scale (own derivation).

    Args:
        tensors: neurons in expert order.
        router: with output softmax and E scores.
    """

    def __init__(self, tensors: SparseFFNTensors, attributes: SparseFFNAttributes, router: Router) -> None:
        self._tensors, self._attributes = tensors, attributes
        self._weights = RouterModule(replace(router, scale=1.0))
        self._scale, self.experts = router.scale, router.granules

    @property
    def granule(self) -> int:
        """g, the neurons of the merged FFN."""
        return self._tensors.w_in.shape[0] // self.experts

    def merge(self, segment: Tensor) -> SparseFFNTensors:
        """The merged FFN, float32: `w_in` [g, n, d], `w_out` [g, d] and the biases.

        Args:
            segment: the FFN inputs [T, d] of a segment, T at least 1.
        """
        share = self._weights(segment.float().mean(0, keepdim=True))[0]

        def merged(value: Tensor) -> Tensor:
            grouped = value.float().reshape(self.experts, self.granule, -1)
            mean: Tensor = torch.tensordot(share, grouped, dims=1)
            return mean.reshape(self.granule, *value.shape[1:])

        gate, up = self._tensors.gate_bias, self._tensors.up_bias
        return replace(
            self._tensors,
            w_in=merged(self._tensors.w_in),
            w_out=merged(self._tensors.w_out) * self._scale,
            gate_bias=None if gate is None else merged(gate),
            up_bias=None if up is None else merged(up),
        )

    def run(self, x: Tensor, merged: SparseFFNTensors) -> Tensor:
        """y [T, d] float32 of the inputs x [T, d]."""
        hidden, _ = neuron_outputs(x, merged.w_in, merged, self._attributes)
        y: Tensor = hidden @ merged.w_out
        return y if merged.down_bias is None else y + merged.down_bias.float()
