"""One layer as the trainers see it: its neurons in expert order, and what each expert adds to the FFN's output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clada_export.errors import UsageError

RELU_LIKE = ("relu", "relu2")
"""Activations that make most hidden values exactly zero, so that "active" means not zero."""
CHUNK_BYTES = 64 * 2**20
"""Size of a temporary tensor of experts' outputs."""
GRAM_BYTES = 2**30
"""Above this, `Reconstruction` multiplies by the down projection each time instead of keeping the experts' inner products."""


@dataclass(frozen=True)
class ExpertLayer:
    """One FFN, neurons in expert order: expert e is neurons `e * granule .. (e + 1) * granule - 1` of every tensor here.

    Attributes:
        x: float32 [N, d], the FFN input of the sampled rows.
        h: float32 [N, f], the hidden activation, input of the down projection.
        w_in: float32 [f, n, d].
        w_out: float32 [f, d]; neuron j adds n_j = h_j * w_out[j] to the output.
        granule: neurons an expert, g; E = f / g experts.
        activation: of the op's contract.
        name: of the layer, for errors.
    """

    x: Tensor
    h: Tensor
    w_in: Tensor
    w_out: Tensor
    granule: int
    activation: str
    name: str = "FFN"

    @property
    def rows(self) -> int:
        """N."""
        return self.x.shape[0]

    @property
    def hidden_size(self) -> int:
        """d."""
        return self.x.shape[1]

    @property
    def neurons(self) -> int:
        """f."""
        return self.h.shape[1]

    @property
    def experts(self) -> int:
        """E."""
        return self.neurons // self.granule

    @property
    def gated(self) -> bool:
        """Whether there is a gate projection."""
        return self.w_in.shape[1] == 2

    def contributions(self) -> Tensor:
        """|h_j| * ||w_out[j]||, the norm of each neuron's output, float32 [N, f] (the test of CETT, arXiv 2402.03804)."""
        norm: Tensor = self.w_out.norm(dim=1)
        return self.h.abs() * norm

    def per_expert(self, value: Tensor) -> Tensor:
        """Sum a value of neurons [.., f] over each expert, [.., E]."""
        return value.reshape(*value.shape[:-1], self.experts, self.granule).sum(-1)

    def expert_outputs(self, rows: Tensor) -> Tensor:
        """y_e, the sum of an expert's neurons' outputs, float32 [B, E, d] of rows int64 [B]; large, so ask for few rows."""
        h = self.h[rows].reshape(-1, self.experts, self.granule)
        return torch.bmm(h.transpose(0, 1), self.w_out.reshape(self.experts, self.granule, -1)).transpose(0, 1)

    def expert_norms(self, rows: Tensor | None = None) -> Tensor:
        """||y_e|| of every expert, float32 [N, E], exact; of the rows numbered int64 [B] if given."""
        wanted = torch.arange(self.rows) if rows is None else rows
        with torch.no_grad():
            return torch.cat([self.expert_outputs(chunk).norm(dim=-1) for chunk in torch.split(wanted, self.chunk_rows)])

    @property
    def chunk_rows(self) -> int:
        """For how many rows to ask `expert_outputs` at once."""
        return max(1, CHUNK_BYTES // (4 * self.experts * self.hidden_size))


def group_neurons(
    x: Tensor,
    h: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    order: np.ndarray | None,
    granule: int,
    activation: str,
    name: str = "FFN",
) -> ExpertLayer:
    """Put a layer's neurons in expert order.

    Args:
        x: [N, d]; h: [N, f]; w_in: [f, n, d]; w_out: [f, d], all in the model's neuron order.
        order: int64 [f] of `cluster_neurons`; None keeps the model's order.
        granule: neurons an expert.

    Raises:
        UsageError: tensors that do not belong together, too few rows to hold some out, or an order that is no permutation.
    """
    f, d = w_out.shape
    shapes = (tuple(x.shape[1:]), tuple(h.shape[1:]), (w_in.shape[0], w_in.shape[2]), h.shape[0])
    if shapes != ((d,), (f,), (f, d), x.shape[0]):
        raise UsageError(
            f"{name}: x {list(x.shape)}, h {list(h.shape)}, w_in {list(w_in.shape)} and w_out {list(w_out.shape)} do not fit "
            "together; wanted [N, d], [N, f], [f, n, d] and [f, d]"
        )
    if granule < 1 or f % granule:
        raise UsageError(f"{name}: {f} neurons can't be split into experts of {granule}")
    if x.shape[0] < 10:
        raise UsageError(f"{name}: {x.shape[0]} rows to train a router on; 10 is the least, some thousand are sensible")
    if not (bool(torch.isfinite(x).all()) and bool(torch.isfinite(h).all())):
        raise UsageError(f"{name}: its inputs or activations are not finite; the model is broken in float32")
    if order is not None:
        if order.shape != (f,) or not np.array_equal(np.sort(order), np.arange(f)):
            raise UsageError(f"{name}: the neuron order is not a permutation of 0..{f - 1}")
        index = torch.from_numpy(order)
        h, w_in, w_out = h[:, index], w_in[index], w_out[index]
    return ExpertLayer(
        x.float().contiguous(), h.float().contiguous(), w_in.float(), w_out.float().contiguous(), granule, activation, name
    )


class Reconstruction:
    """The error of sum_e a_e y_e against the FFN's output y = sum_e y_e, for any weights a of the experts.

    error(a) = ||sum_e a_e y_e - y||^2 / ||y||^2 = (a - 1)^T K (a - 1) / ||y||^2 with K[e, e'] = y_e . y_e' of the row: with K
    kept, a training step costs E^2 a row in place of 2 f d, and no expert's output is (own derivation, an exact identity).
    Where N E^2 floats are too many, h is weighted and multiplied by w_out instead; the numbers are the same.

    The down projection's bias is left out of y: it is added whatever runs.

    Args:
        gram_bytes: most memory for K.
    """

    def __init__(self, layer: ExpertLayer, gram_bytes: int = GRAM_BYTES) -> None:
        self._layer = layer
        with torch.no_grad():
            energy = (layer.h @ layer.w_out).square().sum(-1)
            # A row whose output is all but zero would weigh more than all others.
            self._energy = energy.clamp(min=float(energy.mean()) * 1e-6 + 1e-30)
            self._gram: Tensor | None = None
            if 4 * layer.rows * layer.experts**2 <= gram_bytes:
                self._gram = torch.empty(layer.rows, layer.experts, layer.experts)
                for chunk in torch.split(torch.arange(layer.rows), layer.chunk_rows):
                    outputs = layer.expert_outputs(chunk)
                    self._gram[chunk] = torch.bmm(outputs, outputs.transpose(1, 2))

    def error(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Relative squared error, float32 [B], of rows int64 [B] with experts' weights float32 [B, E]; differentiable."""
        residual = weights - 1.0
        if self._gram is not None:
            squared = (torch.bmm(self._gram[rows], residual.unsqueeze(-1)).squeeze(-1) * residual).sum(-1)
            # Rounding may leave a small negative number where the error is zero.
            squared = squared.clamp(min=0.0)
        else:
            spread = residual.repeat_interleave(self._layer.granule, dim=-1)
            squared = ((self._layer.h[rows] * spread) @ self._layer.w_out).square().sum(-1)
        return squared / self._energy[rows]
