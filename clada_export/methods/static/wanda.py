"""Wanda (arXiv 2306.11695): weights go by |W_ij| ||X_j||_2, compared within an output row; what stays is not changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clada_export.methods.prune_spec import PruneSpec
from clada_export.methods.static.masks import all_but_highest, lowest, lowest_in_rows
from clada_export.methods.static.statistics import column_norms


def weight_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """S_ij = |W_ij| ||X_j||_2 (Eq. 1 of the paper), float32 [out, in], for norms [in]."""
    return weight.float().abs() * norms


def pruner(x: Tensor, spec: PruneSpec, layer: str) -> Callable[[Tensor], Tensor]:
    """What prunes a weight [out, in] whose input rows are x [rows, in]; it returns a new float32 weight."""
    norms = column_norms(x)

    def prune(weight: Tensor) -> Tensor:
        scores = weight_scores(weight, norms)
        mask = (
            lowest_in_rows(scores, spec.removed(scores.shape[1]))
            if spec.group is None
            else all_but_highest(scores, *spec.group)
        )
        return weight.float().masked_fill(mask, 0.0)

    return prune


def neuron_saliency(inputs: Sequence[Tensor], down: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """What the removal of each neuron deletes, float32 [f]: the sum of S_ij^2 over its gate row, up row and down column.

    This is our own derivation, not the paper's. Without weight ij alone, the output of its projection changes by W_ij X_j, of
    squared norm S_ij^2 over the rows; the squared norms of uncorrelated changes add up. The gate and up terms are changes of
    pre-activations and the down term is one of the FFN's output: they are added as they are.

    Args:
        inputs: (gate, up) or (up,), each [f, d].
        down: [d, f].
        x, h: the input rows of both, [rows, d] and [rows, f].
    """
    norms = column_norms(x)
    total = weight_scores(down, column_norms(h)).square().sum(0)
    for weight in inputs:
        total = total + weight_scores(weight, norms).square().sum(1)
    return total


def remove_neurons(
    inputs: Sequence[Tensor], down: Tensor, x: Tensor, h: Tensor, count: int, layer: str
) -> tuple[Tensor, Tensor]:
    """Remove `count` neurons.

    Returns:
        The removed neurons, bool [f], and the down projection without them, float32 [d, f]; what stays is not changed.
    """
    removed = lowest(neuron_saliency(inputs, down, x, h), count)
    return removed, torch.where(removed, torch.zeros(()), down.float())
