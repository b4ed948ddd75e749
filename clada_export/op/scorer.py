"""The score of every neuron, as the op would compute it, for an FFN as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clada_export.op.reference import SparseFFNTensors, dequantize_shadow, neuron_outputs, neuron_scores, quantize_shadow
from graph_passes.op import SparseFFNAttributes


class DenseFFN(Protocol):
    """An FFN's weights in the op's order: hidden_size d, intermediate_size f, n = 2 (gated) or 1 input rows a neuron."""

    @property
    def activation(self) -> str:
        """One of the op's."""
        ...

    @property
    def gated(self) -> bool:
        """Whether it has a gate."""
        ...

    @property
    def has_bias(self) -> bool:
        """Whether any of the projections has a bias."""
        ...

    def w_in(self) -> Tensor:
        """Float32 [f, n, d]."""
        ...

    def w_out(self) -> Tensor:
        """Float32 [f, d]."""
        ...

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of gate [f], up [f] and down [d]."""
        ...


def neuron_scale(w_out: Tensor) -> Tensor:
    """The L2 norm of every neuron's down row, float32 [f]: |h_j| times it is the norm of the neuron's output (CETT, D)."""
    return w_out.float().square().sum(dim=1).sqrt()


def score_constants(score: str, w_in: np.ndarray, w_out: np.ndarray) -> dict[str, np.ndarray]:
    """The constant inputs that a score needs, made from a layer's repacked weights.

    Args:
        score: one of the op's scores.
        w_in: float32 [f, n, d].
        w_out: float32 [f, d].

    Returns:
        By score: `exact` {neuron_scale}, `shadow` {neuron_scale, shadow, shadow_scale}, others nothing.
    """
    constants: dict[str, np.ndarray] = {}
    if score in ("exact", "shadow"):
        constants["neuron_scale"] = neuron_scale(torch.from_numpy(w_out)).numpy()
    if score == "shadow":
        shadow, shadow_scale = quantize_shadow(torch.from_numpy(w_in))
        constants["shadow"], constants["shadow_scale"] = shadow.numpy(), shadow_scale.numpy()
    return constants


@dataclass(frozen=True)
class LayerScorer:
    """Computes scores [.., f] from an FFN's input x [.., d] and its hidden activation h [.., f]."""

    attributes: SparseFFNAttributes
    tensors: SparseFFNTensors
    weight: Tensor | None

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        gate = h
        if self.attributes.score == "gate" and self.attributes.gated:
            assert self.weight is not None
            _, gate = neuron_outputs(x, self.weight, self.tensors, self.attributes)
        return neuron_scores(x, h, gate, self.tensors, self.attributes, None, self.weight)


def layer_attributes(ffn: DenseFFN, score: str, rule: str) -> SparseFFNAttributes:
    """The op's attributes for an FFN, without a load response."""
    return SparseFFNAttributes(activation=ffn.activation, gated=ffn.gated, score=score, rule=rule, has_bias=ffn.has_bias)


def layer_tensors(
    ffn: DenseFFN, score: str, threshold: Tensor, *, keep_weights: bool = True, neurons: np.ndarray | None = None
) -> SparseFFNTensors:
    """All constant inputs of the op for an FFN; `keep_weights=False` leaves w_in empty where the score does not read it.

    Args:
        neurons: int64 [f'], the neurons that the op holds in their order; None keeps all.
    """
    w_in, w_out = ffn.w_in(), ffn.w_out()
    gate_bias, up_bias, down_bias = ffn.biases()
    if neurons is not None:
        order = torch.from_numpy(neurons)
        w_in, w_out = w_in[order], w_out[order]
        gate_bias, up_bias = (None if bias is None else bias[order] for bias in (gate_bias, up_bias))
    constants = {
        key: torch.from_numpy(value) for key, value in score_constants(score, w_in.numpy(), w_out.contiguous().numpy()).items()
    }
    return SparseFFNTensors(
        w_in=w_in if keep_weights else w_in[:0],
        w_out=w_out,
        threshold=threshold,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
        **constants,
    )


def make_scorer(ffn: DenseFFN, score: str) -> LayerScorer:
    """A scorer for an FFN; holds one float32 copy of the input weights where the score needs one."""
    attributes = layer_attributes(ffn, score, "threshold")
    tensors = layer_tensors(ffn, score, torch.zeros(1), keep_weights=score == "gate")
    weight: Tensor | None = None
    if score == "shadow":
        assert tensors.shadow is not None and tensors.shadow_scale is not None
        weight = dequantize_shadow(tensors.shadow, tensors.shadow_scale)
    elif score == "gate":
        weight = tensors.w_in
    return LayerScorer(attributes, tensors, weight)
