"""D2DMoE's router (arXiv 2310.04361): a small MLP that foretells the norm of every expert's output."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clada_export.methods.training.layer import ExpertLayer
from clada_export.methods.training.metrics import captured_share
from clada_export.methods.training.train import (
    Progress,
    Stopwatch,
    TrainingReport,
    TrainingSettings,
    arrays,
    fit,
    input_size,
    linear_weight,
    no_progress,
    split_rows,
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
    watch = Stopwatch()
    norms = layer.expert_norms()
    scale = max(float(norms.mean()), 1e-30)
    target = norms / scale
    size = input_size(layer.x)
    inputs = layer.x / size
    training, heldout = split_rows(layer.rows, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    average = target[training].mean(0)
    first, first_bias = linear_weight(width, layer.hidden_size, generator), torch.zeros(width)
    second, second_bias = linear_weight(layer.experts, width, generator), average.clone()

    def predict(rows: Tensor) -> Tensor:
        hidden = torch.relu(functional.linear(inputs[rows], first, first_bias))
        return functional.linear(hidden, second, second_bias).abs()

    def loss(rows: Tensor) -> Tensor:
        return functional.mse_loss(predict(rows), target[rows])

    def explained(rows: Tensor) -> float:
        variance = (target[rows] - average).square().mean()
        return float(1.0 - loss(rows) / variance.clamp(min=1e-30))

    fitted = fit((first, first_bias, second, second_bias), loss, explained, layer.rows, settings, progress)
    with torch.no_grad():
        captured, oracle = captured_share(predict(heldout), norms[heldout], max(1, round(TOP_SHARE * layer.experts)))
        metrics = {"r2": explained(heldout), "captured": captured, "oracle": oracle}
    weights, biases = arrays(first / size, second), arrays(first_bias, second_bias)
    return Router(weights, biases, hidden="relu", output="abs", scale=scale), watch.report(fitted, metrics)
