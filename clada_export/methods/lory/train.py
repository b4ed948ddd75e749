"""Lory's router (arXiv 2405.03133) for a frozen dense FFN: weights of experts for a segment, from the segment before."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clada_export.errors import UsageError
from clada_export.methods.training.cluster import cluster_neurons
from clada_export.methods.training.train import (
    Progress,
    RouterTask,
    TrainingReport,
    TrainingSettings,
    arrays,
    input_size,
    linear_weight,
    no_progress,
    train_router,
)
from clada_export.op.reference import SparseFFNTensors, activate
from graph_passes.op import SparseFFNAttributes
from graph_passes.router import Router

SETTINGS = TrainingSettings(epochs=8, batch=8, learning_rate=1e-2, patience=2)


def merge_order(w_in: Tensor, experts: int, seed: int = 0, *, name: str = "FFN") -> np.ndarray:
    """Order the neurons so that each f / E neighbours are an expert.

    Experts are clusters (`cluster_neurons`). Which neuron of one expert meets which of another is left to chance: groups of
    neurons that are alike, spread over the experts, make the mean better with even weights, but leave the router nothing to
    choose between, and the rebuilt output is worse (SmolLM2-135M, three layers: mean error 0.59-0.69 against 0.47-0.66).

    Args:
        w_in: float32 [f, n, d].

    Returns:
        int64 [f], a permutation: expert e is `order[e * g : (e + 1) * g]`.

    Raises:
        UsageError: as `cluster_neurons`.
    """
    return cluster_neurons(w_in, w_in.shape[0] // experts, seed, name=name)


def train_lory(
    means: Tensor,
    inputs: Tensor,
    tensors: SparseFFNTensors,
    attributes: SparseFFNAttributes,
    experts: int,
    *,
    name: str = "FFN",
    settings: TrainingSettings = SETTINGS,
    progress: Progress = no_progress,
) -> tuple[Router, TrainingReport]:
    """Linear(d, E) without bias and a softmax on a segment's mean input; y = scale * merged FFN(x) for the next segment.

    loss = the mean over tokens of ||y' - y||^2 / ||y||^2, y the dense FFN's output without its bias (own derivation: Lory
    trains experts and router together on the language-model loss; here the model is frozen and little can be hoped for). The
    scale starts at E, where E equal neurons of weight 1 / E each add up to what they were, and is learnt with the router.

    Args:
        means: float32 [P, d]; inputs: float32 [P, r, d], of `Segments`.
        tensors: of the FFN, float32, neurons in the order of `merge_order`.
        attributes: of the FFN.

    Returns:
        The router, and a report with the metrics `error` (mean of ||y' - y|| / ||y|| on the held-out segments), `even` (the
        same with even weights and the same scale) and `scale`.

    Raises:
        UsageError: the FFN's activations are not finite.
    """
    dense = _DenseFFN(inputs, tensors, attributes, experts, name)
    return train_router(lambda generator: _Shares(means, dense, experts, generator), means.shape[0], settings, progress)


class _DenseFFN:
    """The FFN on the segments' inputs, and what its experts give when they are merged.

    Args:
        inputs: float32 [P, r, d].
        name: of the layer, for errors.
    """

    def __init__(
        self, inputs: Tensor, tensors: SparseFFNTensors, attributes: SparseFFNAttributes, experts: int, name: str
    ) -> None:
        pairs, rows, hidden_size = inputs.shape
        f, n, _ = tensors.w_in.shape
        granule = f // experts
        self._attributes = attributes
        self._w_out = tensors.w_out.reshape(experts, granule, hidden_size)
        with torch.no_grad():
            # Merging weights and merging what they give are the same before the activation, so x meets the weights only once.
            before = torch.einsum("prd,fnd->pnrf", inputs, tensors.w_in)
            for index, bias in enumerate((tensors.gate_bias, tensors.up_bias) if n == 2 else (tensors.up_bias,)):
                if bias is not None:
                    before[:, index] += bias
            self._y = _hidden(before, attributes) @ tensors.w_out
            energy = self._y.square().sum(-1)
            if not bool(torch.isfinite(energy).all()):
                raise UsageError(
                    f"{name}: its activations are not finite on the calibration text; the model is broken in float32"
                )
            self._energy = energy.clamp(min=float(energy.mean()) * 1e-3 + 1e-30)
            self._before = before.reshape(pairs, n, rows, experts, granule)

    def squared(self, segments: Tensor, share: Tensor, scale: Tensor) -> Tensor:
        """||y' - y||^2 / ||y||^2, float32 [B, r], of segments int64 [B] merged by their shares [B, E]."""
        merged = _hidden(torch.einsum("pnreg,pe->pnrg", self._before[segments], share), self._attributes)
        each = torch.einsum("prg,egd->pred", merged, self._w_out)
        found = torch.einsum("pred,pe->prd", each, share) * scale
        return (found - self._y[segments]).square().sum(-1) / self._energy[segments]


class _Shares(RouterTask):
    """Its rows are segments."""

    def __init__(self, means: Tensor, dense: _DenseFFN, experts: int, generator: torch.Generator) -> None:
        self._dense, self._experts = dense, experts
        self._size = input_size(means)
        self._means = means / self._size
        self._weight = linear_weight(experts, means.shape[-1], generator) * 0.1
        self._log_scale = torch.tensor(math.log(experts))
        self.parameters = (self._weight, self._log_scale)

    def _squared(self, segments: Tensor, share: Tensor) -> Tensor:
        return self._dense.squared(segments, share, self._log_scale.exp())

    def _shares(self, segments: Tensor) -> Tensor:
        return functional.linear(self._means[segments], self._weight).softmax(-1)

    def loss(self, rows: Tensor) -> Tensor:
        return self._squared(rows, self._shares(rows)).mean()

    @property
    def _scale(self) -> float:
        return float(self._log_scale.exp())

    def metrics(self, heldout: Tensor) -> dict[str, float]:
        even = torch.full((len(heldout), self._experts), 1.0 / self._experts)
        return {
            "error": float(self._squared(heldout, self._shares(heldout)).sqrt().mean()),
            "even": float(self._squared(heldout, even).sqrt().mean()),
            "scale": self._scale,
        }

    def router(self) -> Router:
        return Router(arrays(self._weight / self._size), (None,), output="softmax", scale=self._scale)


def _hidden(before: Tensor, attributes: SparseFFNAttributes) -> Tensor:
    """The hidden activation [P, r, ..] of pre-activations [P, n, r, ..]."""
    activated = activate(attributes.activation, before[:, 0])
    return activated * before[:, 1] if attributes.gated else activated
