"""LTE's router (arXiv 2402.06126): an independent gate for every expert, pushed to be shut and to be sure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from clada_export.errors import UsageError
from clada_export.methods.training.gates import LinearGates
from clada_export.methods.training.layer import ExpertLayer, Reconstruction
from clada_export.methods.training.metrics import captured_share, output_error
from clada_export.methods.training.train import (
    Fitted,
    Progress,
    RouterTask,
    Stopwatch,
    TrainingReport,
    TrainingSettings,
    arrays,
    no_progress,
    split_rows,
    train_router,
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
class LossWeights:
    """Weights of LTE's losses: `efficiency` (l1) shuts experts, `separability` (l2) pushes gates off the threshold."""

    efficiency: float
    separability: float = SEPARABILITY

    def check(self, name: str) -> None:
        """Refuse negative ones.

        Args:
            name: of the layer.

        Raises:
            UsageError: says which.
        """
        if self.efficiency < 0.0 or self.separability < 0.0:
            raise UsageError(
                f"{name}: weights of LTE's losses are not negative; efficiency is {self.efficiency}, separability "
                f"{self.separability}"
            )


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
    weights = LossWeights(efficiency, separability)
    weights.check(layer.name)

    def make(generator: torch.Generator) -> RouterTask:
        return _Gates(layer, reconstruction or Reconstruction(layer), weights, generator)

    return train_router(make, layer.rows, settings, progress)


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
    tried: list[_Trial] = []
    while len(tried) < TRIALS and not (tried and _nearest(tried, sparsity).miss(sparsity) <= SPARSITY_TOLERANCE):
        weights = LossWeights(_next_efficiency([(item.efficiency, item.shut) for item in tried], sparsity), separability)
        tried.append(_try(layer, errors, weights, settings))
        progress(len(tried), TRIALS)
    best = _nearest(tried, sparsity)
    shift = 0.0
    if best.miss(sparsity) > SPARSITY_TOLERANCE:
        shift = best.gates.shift_to(sparsity, split_rows(layer.rows, settings.seed)[1])
    search = {"efficiency": best.efficiency, "trainings": float(len(tried)), "bias_shift": shift}
    metrics = best.gates.told(layer.rows, settings)
    return best.gates.router(), watch.report(best.fitted, {**metrics, **search})


class _Gates(LinearGates):
    def __init__(self, layer: ExpertLayer, errors: Reconstruction, weights: LossWeights, generator: torch.Generator) -> None:
        super().__init__(layer, errors, generator)
        self._weights = weights
        self._bias = torch.full((layer.experts,), OPEN_BIAS)
        self.parameters = (self._weight, self._bias)

    def loss(self, rows: Tensor) -> Tensor:
        gate = torch.sigmoid(functional.linear(self._inputs[rows], self._weight, self._bias))
        push = 1.0 / ((gate - THRESHOLD).square() + SEPARABILITY_FLOOR)
        task = self._errors.error(rows, gate).mean()
        return task + self._weights.efficiency * gate.square().mean() + self._weights.separability * push.mean()

    def logits(self, rows: Tensor) -> Tensor:
        """Of the router as it will be, on inputs as they are: [B, E]."""
        return functional.linear(self._layer.x[rows], self._weight / self._size, self._bias)

    def shut(self, rows: Tensor) -> float:
        """The share of gates that are shut."""
        return float((torch.sigmoid(self.logits(rows)) <= THRESHOLD).float().mean())

    def shift_to(self, sparsity: float, rows: Tensor) -> float:
        """Add one number to all biases so that a share `sparsity` of the rows' gates is shut; the number."""
        logits = self.logits(rows).flatten().sort().values
        shift = -float(logits[min(round(sparsity * len(logits)), len(logits) - 1)]) + 1e-6
        self._bias = self._bias + shift
        return shift

    def metrics(self, heldout: Tensor) -> dict[str, float]:
        gate = torch.sigmoid(self.logits(heldout))
        running = gate > THRESHOLD
        captured, oracle = captured_share(gate, self._layer.expert_norms(heldout), running.sum(-1))
        return {
            "sparsity": 1.0 - float(running.float().mean()),
            "error": output_error(self._errors, heldout, running.float()),
            "captured": captured,
            "oracle": oracle,
            "unsure": float(((gate - THRESHOLD).abs() < 0.1).float().mean()),
        }

    def router(self) -> Router:
        return Router(arrays(self._weight / self._size), arrays(self._bias))


@dataclass(frozen=True)
class _Trial:
    """Trained gates, the efficiency weight that they were trained with, and the share that is shut on the held-out rows."""

    gates: _Gates
    efficiency: float
    fitted: Fitted
    shut: float

    def miss(self, sparsity: float) -> float:
        return abs(self.shut - sparsity)


def _try(layer: ExpertLayer, errors: Reconstruction, weights: LossWeights, settings: TrainingSettings) -> _Trial:
    weights.check(layer.name)
    gates = _Gates(layer, errors, weights, torch.Generator().manual_seed(settings.seed))
    fitted = gates.fit(layer.rows, settings)
    return _Trial(gates, weights.efficiency, fitted, gates.shut(split_rows(layer.rows, settings.seed)[1]))


def _nearest(tried: list[_Trial], sparsity: float) -> _Trial:
    """Of equal ones the first."""
    return min(tried, key=lambda item: item.miss(sparsity))


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
