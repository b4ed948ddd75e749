"""The score of every neuron, as the op would compute it, for an FFN as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clada_export.op.reference import SparseFFNTensors, activate, quantize_shadow
from graph_passes.op import SHADOW_BLOCK, ContractError, SparseFFNAttributes


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

    def input_rows(self) -> tuple[Tensor, ...]:
        """(gate, up) or (up,), each [f, d], the model's own memory."""
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


class LayerScorer:
    """Computes scores [.., f] from an FFN's input x [.., d] and its hidden activation h [.., f].

    Between calls it holds no float32 copy of a weight: `gate` reads the model's own rows, `shadow` keeps the 4-bit copies and
    makes of them what they stand for, a projection at a time, when it is called.

    Args:
        ffn: its weights as they are now; they must not change while the scorer is used.
        score: one of the op's, but `prefix` and `external`.
        keep: where the 4-bit copies are kept; what it returns takes the place of the tensor.
    """

    def __init__(self, ffn: DenseFFN, score: str, keep: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        self.attributes = layer_attributes(ffn, score, "threshold")
        self._ffn = ffn
        self._scale = neuron_scale(ffn.w_out().contiguous()) if score in ("exact", "shadow") else None
        self._shadow: list[tuple[Tensor, Tensor]] = []
        if score == "shadow":
            for rows in ffn.input_rows():
                # A row's blocks are its own, so that projections can be quantised one by one.
                codes, grid = quantize_shadow(rows.unsqueeze(1))
                self._shadow.append((keep(codes), keep(grid)))

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        match self.attributes.score:
            case "gate" if self.attributes.gated:
                return self._gate(x, self._ffn.input_rows()[0].float()).abs_()
            case "gate":
                return h.abs()
            case "exact":
                assert self._scale is not None
                return h.abs().mul_(self._scale)
            case "shadow":
                assert self._scale is not None
                return self._estimate(x).abs_().mul_(self._scale)
        raise ContractError(f"SparseFFN: score {self.attributes.score!r} is not computed from x")

    def _estimate(self, x: Tensor) -> Tensor:
        """The hidden activation that the 4-bit copies give."""
        if not self.attributes.gated:
            _, bias, _ = self._ffn.biases()
            return activate(self.attributes.activation, _product(x, dequantize_shadow_rows(*self._shadow[0]), bias))
        gate = self._gate(x, dequantize_shadow_rows(*self._shadow[0]))
        return gate.mul_(_product(x, dequantize_shadow_rows(*self._shadow[1]), self._ffn.biases()[1]))

    def _gate(self, x: Tensor, rows: Tensor) -> Tensor:
        return activate(self.attributes.activation, _product(x, rows, self._ffn.biases()[0]))


def dequantize_shadow_rows(shadow: Tensor, shadow_scale: Tensor) -> Tensor:
    """As `dequantize_shadow`, to the bit, for one projection: [f, 1, d/2] and [f, 1, d/32, 2] to float32 [f, d]."""
    f, _, half_d = shadow.shape
    half = SHADOW_BLOCK // 2
    packed = shadow.view(torch.uint8).reshape(f, half_d // half, half)
    rows = torch.empty(f, half_d // half, SHADOW_BLOCK)
    rows[..., :half] = packed & 15
    rows[..., half:] = packed >> 4
    scale, offset = shadow_scale[:, 0].float().unsqueeze(-1).unbind(-2)
    # A product of 4 and 11 bits is exact, so that one rounding is all there is in either order.
    return rows.mul_(scale).add_(offset).reshape(f, half_d * 2)


def _product(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    found = torch.nn.functional.linear(x.float(), rows)
    return found if bias is None else found.add_(bias)


def layer_attributes(ffn: DenseFFN, score: str, rule: str) -> SparseFFNAttributes:
    """The op's attributes for an FFN, without a load response."""
    return SparseFFNAttributes(activation=ffn.activation, gated=ffn.gated, score=score, rule=rule, has_bias=ffn.has_bias)


def layer_tensors(ffn: DenseFFN, score: str, threshold: Tensor, *, neurons: np.ndarray | None = None) -> SparseFFNTensors:
    """All constant inputs of the op for an FFN.

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
        w_in=w_in,
        w_out=w_out,
        threshold=threshold,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
        **constants,
    )
