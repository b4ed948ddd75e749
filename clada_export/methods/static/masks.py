"""Which scores are the lowest: exact counts, and ties broken by position."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 1024


def lowest_in_rows(score: Tensor, count: int) -> Tensor:
    """A bool mask [rows, width] with `count` True in every row: its lowest scores, of equal ones the first."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    # int64 places are twice as large as the scores: a few rows at a time.
    for part, found in zip(torch.split(score, _ROWS), torch.split(mask, _ROWS), strict=True):
        found.scatter_(1, part.sort(dim=1, stable=True).indices[:, :count], True)
    return mask


def lowest(score: Tensor, count: int) -> Tensor:
    """A bool mask of the shape of `score` with `count` True in all."""
    return lowest_in_rows(score.reshape(1, -1), count).view(score.shape)


def all_but_highest(score: Tensor, n: int, m: int) -> Tensor:
    """A bool mask [rows, width]: of every m consecutive scores in a row, all but the n highest. m divides the width."""
    groups = score.reshape(-1, m)
    return lowest_in_rows(groups, m - n).view(score.shape)
