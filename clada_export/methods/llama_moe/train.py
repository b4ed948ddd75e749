"""LLaMA-MoE's router (github.com/pjlab-sys4nlp/llama-moe): the top-k experts, each weighted by its softmax gate and a scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clada_export.methods.training.experts import require_k
from clada_export.methods.training.gates import LinearGates
from clada_export.methods.training.layer import ExpertLayer, Reconstruction
from clada_export.methods.training.metrics import captured_share, output_error, top_mask
from clada_export.methods.training.train import (
    Progress,
    RouterTask,
    TrainingReport,
    TrainingSettings,
    arrays,
    no_progress,
    train_router,
)
from graph_passes.router import Router

BALANCE = 1e-2
SETTINGS = TrainingSettings(epochs=30, batch=128, learning_rate=3e-3, patience=5)


def train_llama_moe(
    layer: ExpertLayer,
    *,
    k: int,
    balance: float = BALANCE,
    reconstruction: Reconstruction | None = None,
    settings: TrainingSettings = SETTINGS,
    progress: Progress = no_progress,
) -> tuple[Router, TrainingReport]:
    """Linear(d, E), no bias; score = scale * softmax over all experts; y = sum over the top k of score_e y_e.

    loss = ||sum_{e in top k} scale G_e y_e - y||^2 / ||y||^2 + balance * cv^2(importance)

    importance_e is the sum of an expert's gates, where it is chosen, over the batch, and cv^2 the squared coefficient of
    variation: LLaMA-MoE's balance loss with its weight of 1e-2. Its second term, cv^2(load), has a gradient only through the
    noise that it adds to the gates; we add none. LLaMA-MoE trains the model along, on its language-model loss; here the model
    is frozen and the first term is the FFN's own error (own derivation). An expert that is not chosen would have no gradient,
    and the choice would hardly be revised; so in the backward pass its gate counts as if it were used (straight-through, own
    derivation).

    The scale is needed because the model was not trained with gates that sum to 1. LLaMA-MoE takes a softmax over the chosen
    experts and sets its `score_scale_factor` by hand. Ours runs over all experts, and the scale is learnt with the gates (own
    derivation). It begins at k, where a gate spread evenly over k experts weighs each by 1, as the dense FFN does. It ends
    between k and E: the gates of the experts left out hold a part of the sum, and experts that run may weigh more than 1 to
    make up for those that do not.

    Args:
        k: experts a row, 1..E.
        balance: weight of the balance loss.
        reconstruction: of the layer, if the caller has one already.

    Returns:
        The router, and a report with the metrics `error` (mean of ||sum over the top k of score_e y_e - y|| / ||y||),
        `unweighted` (the same with the chosen experts' outputs summed as they are), `captured` (share of the summed expert
        norms within the top k), `oracle` (the best possible) and `scale`.

    Raises:
        UsageError: k is not 1..E.
    """
    require_k(layer, k)

    def make(generator: torch.Generator) -> RouterTask:
        return _Gates(layer, reconstruction or Reconstruction(layer), k, balance, generator)

    return train_router(make, layer.rows, settings, progress)


class _Gates(LinearGates):
    def __init__(self, layer: ExpertLayer, errors: Reconstruction, k: int, balance: float, generator: torch.Generator) -> None:
        super().__init__(layer, errors, generator)
        self._k, self._balance = k, balance
        self._log_scale = torch.tensor(math.log(k))
        self.parameters = (self._weight, self._log_scale)

    def _chosen(self, rows: Tensor) -> Tensor:
        gate = self._softmax(rows)
        mask = top_mask(gate.detach(), self._k)
        # The second term is zero, but lets the gates of the experts left out hear of the error that they leave.
        return gate * mask + (gate - gate.detach()) * ~mask

    def loss(self, rows: Tensor) -> Tensor:
        gate = self._chosen(rows)
        importance = gate.sum(0)
        uneven = importance.var(correction=0) / importance.mean().square()
        return self._errors.error(rows, gate * self._log_scale.exp()).mean() + self._balance * uneven

    @property
    def _scale(self) -> float:
        return float(self._log_scale.exp())

    def metrics(self, heldout: Tensor) -> dict[str, float]:
        gate = self._softmax(heldout)
        captured, oracle = captured_share(gate, self._layer.expert_norms(heldout), self._k)
        return {
            "error": output_error(self._errors, heldout, self._chosen(heldout) * self._scale),
            "unweighted": output_error(self._errors, heldout, top_mask(gate, self._k).float()),
            "captured": captured,
            "oracle": oracle,
            "scale": self._scale,
        }

    def router(self) -> Router:
        return Router(arrays(self._weight / self._size), (None,), output="softmax", scale=self._scale)
