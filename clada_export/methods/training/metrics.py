"""How well scores pick experts, on rows that were held out."""

from __future__ import annotations

import torch
from torch import Tensor

from clada_export.methods.training.layer import Reconstruction


def top_mask(score: Tensor, count: int | Tensor) -> Tensor:
    """bool [N, E]: the `count` (one number, or int64 [N]) highest scores of every row."""
    if isinstance(count, int):
        # Ten times faster than ranks for the thousands of neurons of a large layer.
        best = score.topk(count, dim=-1, sorted=False).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
    order = score.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(score.shape[-1]).expand_as(order).contiguous())
    return rank < count.unsqueeze(-1)


def captured_share(score: Tensor, mass: Tensor, count: int | Tensor) -> tuple[float, float]:
    """Mean over rows of the share of `mass` [N, E] within the top `count` by score, and by the mass itself (the oracle)."""
    total = mass.sum(-1).clamp(min=1e-30)
    found = (mass * top_mask(score, count)).sum(-1) / total
    best = (mass * top_mask(mass, count)).sum(-1) / total
    return float(found.mean()), float(best.mean())


def output_error(reconstruction: Reconstruction, rows: Tensor, weights: Tensor) -> float:
    """Mean over rows of ||sum_e a_e y_e - y|| / ||y||."""
    return float(reconstruction.error(rows, weights).sqrt().mean())
