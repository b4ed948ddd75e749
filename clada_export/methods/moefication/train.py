"""MoEfication's MLP router (arXiv 2110.01786): how much each expert's neurons will fire."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clada_export.methods.training.layer import RELU_LIKE, ExpertLayer
from clada_export.methods.training.metrics import captured_share
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

TOP_SHARE = 0.2
"""Share of the experts that the metric lets run, as in MoEfication."""
SETTINGS = TrainingSettings(epochs=30, batch=128, learning_rate=0.01, patience=5)


def expert_activity(layer: ExpertLayer) -> Tensor:
    """What the router is to foretell, float32 [N, E], not negative.

    The sum of an expert's activations in a plain ReLU FFN (the paper's target); the sum of |h_j| * ||w_out[j]|| otherwise,
    since activations of either sign would cancel (own derivation).
    """
    if layer.activation in RELU_LIKE and not layer.gated:
        return layer.per_expert(layer.h)
    return layer.per_expert(layer.contributions())


def expert_centres(layer: ExpertLayer) -> Tensor:
    """The mean of each expert's normalised gate rows (plain FFN: up rows), float32 [E, d]."""
    rows = functional.normalize(layer.w_in[:, 0], dim=-1)
    return rows.reshape(layer.experts, layer.granule, -1).mean(1)


def train_moefication(
    layer: ExpertLayer, *, settings: TrainingSettings = SETTINGS, progress: Progress = no_progress
) -> tuple[Router, TrainingReport]:
    """Linear(d, E) -> tanh -> Linear(E, E), no biases, on x / ||x||; score = sigmoid.

    As in MoEfication's code: the first layer begins at the experts' centres, the second at the identity; the target is
    `expert_activity` divided by the batch's maximum, the loss binary cross-entropy with logits, the optimiser Adam at 0.01.

    Returns:
        The router, and a report with the metrics `captured` (share of the activity within the top 20% of the experts),
        `oracle` (the best possible) and `ratio` of the two.
    """
    return train_router(lambda generator: _Activity(layer), layer.rows, settings, progress)


class _Activity(RouterTask):
    """Begins where the weights say, so that nothing is drawn."""

    def __init__(self, layer: ExpertLayer) -> None:
        self._activity = expert_activity(layer)
        self._inputs = functional.normalize(layer.x, dim=-1)
        self._first, self._second = expert_centres(layer).clone(), torch.eye(layer.experts)
        self._count = max(1, round(TOP_SHARE * layer.experts))
        self.parameters = (self._first, self._second)

    def _logits(self, rows: Tensor) -> Tensor:
        return functional.linear(torch.tanh(functional.linear(self._inputs[rows], self._first)), self._second)

    def loss(self, rows: Tensor) -> Tensor:
        target = self._activity[rows]
        return functional.binary_cross_entropy_with_logits(self._logits(rows), target / target.max().clamp(min=1e-30))

    def metric(self, rows: Tensor) -> float:
        """The share of the activity that is captured."""
        return captured_share(self._logits(rows), self._activity[rows], self._count)[0]

    def metrics(self, heldout: Tensor) -> dict[str, float]:
        found, best = captured_share(self._logits(heldout), self._activity[heldout], self._count)
        return {"captured": found, "oracle": best, "ratio": found / max(best, 1e-30)}

    def router(self) -> Router:
        return Router(arrays(self._first, self._second), (None, None), hidden="tanh", normalise=True)
