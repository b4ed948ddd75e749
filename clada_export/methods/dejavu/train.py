"""DejaVu's predictor (arXiv 2310.17157): a low-rank linear map that says which neurons of a row will matter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clada_export.errors import UsageError
from clada_export.methods.training.layer import RELU_LIKE, ExpertLayer
from clada_export.methods.training.metrics import top_mask
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
from graph_passes.router import Router

RANK_SHARE = 0.04
SMALLEST_RANK = 32
SETTINGS = TrainingSettings(epochs=20, batch=128, learning_rate=3e-3, weight_decay=0.01, patience=5, enough=0.99)


def predictor_rank(layer: ExpertLayer) -> int:
    """4% of f, at least 32, at most what the product of the two layers can use.

    DejaVu's rank is 1000 for OPT-175B (2% of f); 4% of f is what NimbleEdge's sparse_transformers uses for smaller models.
    """
    return min(max(SMALLEST_RANK, round(RANK_SHARE * layer.neurons)), layer.hidden_size, layer.experts)


def dejavu_labels(layer: ExpertLayer, label_share: float | None = None) -> Tensor:
    """Which granules are to be found, bool [N, E].

    Args:
        label_share: the share of granules with the largest sum of |h_j| * ||w_out[j]|| in each row (own derivation: smooth
            activations have no zeros). None: h_j != 0, DejaVu's label, where the activation has zeros and granules are single
            neurons; 0.5 otherwise.

    Raises:
        UsageError: a share that is not between 0 and 1.
    """
    if label_share is None and layer.activation in RELU_LIKE and layer.granule == 1:
        return layer.h != 0
    share = 0.5 if label_share is None else label_share
    if not 0.0 < share < 1.0:
        raise UsageError(f"{layer.name}: a label share of {share}; it is the share of neurons to find, between 0 and 1")
    return top_mask(layer.per_expert(layer.contributions()), max(1, round(share * layer.experts)))


def train_dejavu(
    layer: ExpertLayer,
    *,
    rank: int | None = None,
    label_share: float | None = None,
    settings: TrainingSettings = SETTINGS,
    progress: Progress = no_progress,
) -> tuple[Router, TrainingReport]:
    """Linear(d, rank) -> Linear(rank, E), no biases, nothing between; score = sigmoid.

    Loss, from DejaVu's code: binary cross-entropy, where an element weighs y (1 - w) + w with w the batch's positive rate
    + 0.005, so that zeros weigh little where positives are rare. AdamW, early stop after 5 epochs without a better recall or
    at a recall of 0.99. Its 20 epochs are over 400,000 rows; with a few thousand rows the steps are far fewer.

    Args:
        rank: None for `predictor_rank`.
        label_share: see `dejavu_labels`.

    Returns:
        The router, and a report with the metrics `recall` (share of a row's true granules among as many top-scored ones) and
        `chance` (the recall of a random choice: the positive rate).

    Raises:
        UsageError: a rank or a label share that makes no sense.
    """
    width = predictor_rank(layer) if rank is None else rank
    if width < 1:
        raise UsageError(f"{layer.name}: a predictor of rank {width}; it must be at least 1")
    labels = dejavu_labels(layer, label_share)
    return train_router(lambda generator: _Predictor(layer, labels, width, generator), layer.rows, settings, progress)


class _Predictor(RouterTask):
    def __init__(self, layer: ExpertLayer, labels: Tensor, rank: int, generator: torch.Generator) -> None:
        self._labels, self._size = labels, input_size(layer.x)
        self._inputs = layer.x / self._size
        self._down = linear_weight(rank, layer.hidden_size, generator)
        self._up = linear_weight(layer.experts, rank, generator)
        self.parameters = (self._down, self._up)

    def _logits(self, rows: Tensor) -> Tensor:
        return functional.linear(functional.linear(self._inputs[rows], self._down), self._up)

    def loss(self, rows: Tensor) -> Tensor:
        y = self._labels[rows].float()
        rate = y.mean() + 0.005
        return functional.binary_cross_entropy_with_logits(self._logits(rows), y, weight=y * (1.0 - rate) + rate)

    def metric(self, rows: Tensor) -> float:
        """The recall."""
        y = self._labels[rows]
        wanted = y.sum(-1)
        found = (top_mask(self._logits(rows), wanted) & y).sum(-1)
        usable = wanted > 0
        return float((found[usable] / wanted[usable]).mean()) if bool(usable.any()) else 0.0

    def metrics(self, heldout: Tensor) -> dict[str, float]:
        return {"recall": self.metric(heldout), "chance": float(self._labels[heldout].float().mean())}

    def router(self) -> Router:
        return Router(arrays(self._down / self._size, self._up), (None, None))
