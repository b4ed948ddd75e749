"""D2DMoE's router (arXiv 2310.04361): a small MLP that foretells the norm of every expert's output."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clada_export.methods.training.layer import ExpertLayer
from clada_export.methods.training.metrics import captured_share
from clada_export.methods.training.train import (
    Progress,
    RouterTask,
    TrainingReport,
    TrainingSettings,
    arrays,
    input_size,
    linear_weight,
    no_progress,
    split_rows,
    train_router,
)
from graph_passes.router import Router

WIDTH = 128
TOP_SHARE = 0.2
SETTINGS = TrainingSettings(epochs=40, batch=128, learning_rate=1e-3, patience=5)


def train_d2dmoe(
    layer: ExpertLayer,
    *,
    width: int = WIDTH,
    settings: TrainingSettings = SETTINGS,
    progress: Progress = no_progress,
) -> tuple[Router, TrainingReport]:
    """Linear(d, width) -> ReLU -> Linear(width, E), with biases; score = scale * |.|, in units of the output.

    The loss is D2DMoE's: the mean squared error of the predicted against the exact norm ||y_e||, the model frozen. The targets
    are divided by their mean, which is the router's scale, and the last bias begins at each expert's mean (both own
    derivation: they change where training begins, not what it aims at).

    Returns:
        The router, and a report with the metrics `r2` (share of the variance *around each expert's own mean* that is explained,
        so that knowing which experts are large on average earns nothing), `captured` (share of the summed norms within the
        top 20% of the experts) and `oracle` (the best possible).
    """
    training, _ = split_rows(layer.rows, settings.seed)
    return train_router(lambda generator: _Norms(layer, width, training, generator), layer.rows, settings, progress)


class _Norms(RouterTask):
    def __init__(self, layer: ExpertLayer, width: int, training: Tensor, generator: torch.Generator) -> None:
        self._norms = layer.expert_norms()
        self._scale = max(float(self._norms.mean()), 1e-30)
        self._target = self._norms / self._scale
        self._size = input_size(layer.x)
        self._inputs = layer.x / self._size
        self._average = self._target[training].mean(0)
        self._first, self._first_bias = linear_weight(width, layer.hidden_size, generator), torch.zeros(width)
        self._second, self._second_bias = linear_weight(layer.experts, width, generator), self._average.clone()
        self.parameters = (self._first, self._first_bias, self._second, self._second_bias)

    def _predict(self, rows: Tensor) -> Tensor:
        hidden = torch.relu(functional.linear(self._inputs[rows], self._first, self._first_bias))
        return functional.linear(hidden, self._second, self._second_bias).abs()

    def loss(self, rows: Tensor) -> Tensor:
        return functional.mse_loss(self._predict(rows), self._target[rows])

    def metric(self, rows: Tensor) -> float:
        """The share of the variance that is explained."""
        variance = (self._target[rows] - self._average).square().mean()
        return float(1.0 - self.loss(rows) / variance.clamp(min=1e-30))

    def metrics(self, heldout: Tensor) -> dict[str, float]:
        norms = self._norms[heldout]
        captured, oracle = captured_share(self._predict(heldout), norms, max(1, round(TOP_SHARE * norms.shape[-1])))
        return {"r2": self.metric(heldout), "captured": captured, "oracle": oracle}

    def router(self) -> Router:
        weights, biases = arrays(self._first / self._size, self._second), arrays(self._first_bias, self._second_bias)
        return Router(weights, biases, hidden="relu", output="abs", scale=self._scale)
