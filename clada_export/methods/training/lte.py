"""LTE's router (arXiv 2402.06126): an independent gate for every expert, pushed to be shut and to be sure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from clada_export.errors import UsageError
from clada_export.methods.training.layer import ExpertLayer, Reconstruction
from clada_export.methods.training.metrics import captured_share, output_error
from clada_export.methods.training.train import (
    Fitted,
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

THRESHOLD = 0.5
"""A gate above this is open; LTE's value."""
SEPARABILITY = 1e-3
SEPARABILITY_FLOOR = 0.05
OPEN_BIAS = 2.0
SETTINGS = TrainingSettings(epochs=20, batch=128, learning_rate=1e-2, patience=5)
SPARSITY_TOLERANCE = 0.02
FIRST_EFFICIENCY = 0.6
TRIALS = 8


@dataclass(frozen=True)
class _Gates:
    """Trained gates and how they were trained."""

    weight: Tensor
    bias: Tensor
    fitted: Fitted

    def __call__(self, x: Tensor) -> Tensor:
        return torch.sigmoid(functional.linear(x, self.weight, self.bias))


def train_lte(
    layer: ExpertLayer,
    *,
    efficiency: float,
    separability: float = SEPARABILITY,
    reconstruction: Reconstruction | None = None,
    settings: TrainingSettings = SETTINGS,
    progress: Progress = no_progress,
) -> tuple[Router, TrainingReport]:
    """Linear(d, E) with a bias; score = sigmoid, and an expert runs if its score is above 0.5.

    loss = task + efficiency * mean(G^2) + separability * mean(1 / ((G - 0.5)^2 + 0.05))

    The efficiency loss is LTE's. The separability loss has the 1 / (G - threshold)^2 form of the paper from memory; the number
    that keeps it finite is our own. LTE trains the model along, on its language-model loss; here the model is frozen, and the
    task term is the FFN's own error ||sum_e G_e y_e - y||^2 / ||y||^2 (own derivation). Gates begin open (bias 2), where
    that error is small.

    Args:
        efficiency: l1, not negative; higher shuts more experts. `lte_for_sparsity` finds it.
        separability: l2, not negative.
        reconstruction: of the layer, if the caller has one already.

    Returns:
        The router, and a report with the metrics `sparsity` (share of experts with a gate of at most 0.5), `error` (mean of
        ||y_open - y|| / ||y|| with the open experts' outputs summed unweighted), `captured` (share of the summed expert norms
        within the open ones), `oracle` (the best with as many experts in each row) and `unsure` (share of gates within 0.1 of
        the threshold).

    Raises:
        UsageError: a negative weight of a loss.
    """
    watch = Stopwatch()
    errors = reconstruction or Reconstruction(layer)
    gates = _train(layer, errors, efficiency, separability, settings, progress)
    return _router(gates), watch.report(gates.fitted, _metrics(layer, errors, gates, settings.seed))


def lte_for_sparsity(
    layer: ExpertLayer,
    sparsity: float,
    *,
    separability: float = SEPARABILITY,
    reconstruction: Reconstruction | None = None,
    settings: TrainingSettings = SETTINGS,
    progress: Progress = no_progress,
) -> tuple[Router, TrainingReport]:
    """`train_lte` with the efficiency weight that leaves a wanted share of experts shut on the held-out rows, within 2 points.

    Each trial trains anew; false position on the logarithm of the weight finds the next. Where the share jumps over the target
    (a strong separability, few rows), the nearest trial is taken and one number is added to all its biases so that the share is
    met (own derivation).

    Args:
        sparsity: mean share of shut experts, above 0 and below 1.
        progress: called with (trainings done, most trainings).

    Returns:
        As `train_lte`, with three metrics more: `efficiency` (the weight that was taken), `trainings` (how many were needed)
        and `bias_shift` (0 where training alone came close enough). Epochs and losses are those of the training taken,
        seconds those of all.

    Raises:
        UsageError: a sparsity that is not within (0, 1), or a negative separability.
    """
    if not 0.0 < sparsity < 1.0:
        raise UsageError(f"{layer.name}: a sparsity of {sparsity}; it is the share of experts to shut, above 0 and below 1")
    watch = Stopwatch()
    errors = reconstruction or Reconstruction(layer)
    heldout = layer.x[split_rows(layer.rows, settings.seed)[1]]
    tried: list[tuple[float, float]] = []
    best: _Gates | None = None
    taken = FIRST_EFFICIENCY
    miss = math.inf
    while len(tried) < TRIALS and miss > SPARSITY_TOLERANCE:
        efficiency = _next_efficiency(tried, sparsity)
        gates = _train(layer, errors, efficiency, separability, settings, no_progress)
        found = float((gates(heldout) <= THRESHOLD).float().mean())
        tried.append((efficiency, found))
        progress(len(tried), TRIALS)
        if abs(found - sparsity) < miss:
            best, taken, miss = gates, efficiency, abs(found - sparsity)
    assert best is not None
    shift = 0.0
    if miss > SPARSITY_TOLERANCE:
        logits = functional.linear(heldout, best.weight, best.bias).flatten().sort().values
        shift = -float(logits[min(round(sparsity * len(logits)), len(logits) - 1)]) + 1e-6
        best = _Gates(best.weight, best.bias + shift, best.fitted)
    search = {"efficiency": taken, "trainings": float(len(tried)), "bias_shift": shift}
    return _router(best), watch.report(best.fitted, {**_metrics(layer, errors, best, settings.seed), **search})


def _next_efficiency(tried: list[tuple[float, float]], sparsity: float) -> float:
    """Between the nearest trials below and above the target, or three times beyond the last on the side that is missing."""
    below = [item for item in tried if item[1] < sparsity]
    above = [item for item in tried if item[1] >= sparsity]
    if not tried:
        return FIRST_EFFICIENCY
    if not below:
        return min(above)[0] / 3.0
    if not above:
        return max(below)[0] * 3.0
    (low, at_low), (high, at_high) = max(below), min(above)
    # Kept off the ends, where false position creeps.
    share = min(max((sparsity - at_low) / max(at_high - at_low, 1e-9), 0.2), 0.8)
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))


def _train(
    layer: ExpertLayer,
    errors: Reconstruction,
    efficiency: float,
    separability: float,
    settings: TrainingSettings,
    progress: Progress,
) -> _Gates:
    if efficiency < 0.0 or separability < 0.0:
        raise UsageError(
            f"{layer.name}: weights of LTE's losses are not negative; efficiency is {efficiency}, separability {separability}"
        )
    size = input_size(layer.x)
    inputs = layer.x / size
    generator = torch.Generator().manual_seed(settings.seed)
    weight = linear_weight(layer.experts, layer.hidden_size, generator) * 0.1
    bias = torch.full((layer.experts,), OPEN_BIAS)

    def loss(rows: Tensor) -> Tensor:
        gate = torch.sigmoid(functional.linear(inputs[rows], weight, bias))
        push = 1.0 / ((gate - THRESHOLD).square() + SEPARABILITY_FLOOR)
        return errors.error(rows, gate).mean() + efficiency * gate.square().mean() + separability * push.mean()

    fitted = fit((weight, bias), loss, lambda rows: -float(loss(rows)), layer.rows, settings, progress)
    return _Gates(weight / size, bias, fitted)


def _router(gates: _Gates) -> Router:
    return Router(arrays(gates.weight), arrays(gates.bias))


def _metrics(layer: ExpertLayer, errors: Reconstruction, gates: _Gates, seed: int) -> dict[str, float]:
    _, heldout = split_rows(layer.rows, seed)
    with torch.no_grad():
        gate = gates(layer.x[heldout])
        running = gate > THRESHOLD
        captured, oracle = captured_share(gate, layer.expert_norms(heldout), running.sum(-1))
        return {
            "sparsity": 1.0 - float(running.float().mean()),
            "error": output_error(errors, heldout, running.float()),
            "captured": captured,
            "oracle": oracle,
            "unsure": float(((gate - THRESHOLD).abs() < 0.1).float().mean()),
        }
