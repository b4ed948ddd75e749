"""The rules of the op on one axis, so that calibration treats them alike.

A rule turns scores into *values* and its threshold into a *level*, such that a granule runs iff its value is at least the
level; a higher level is sparser. `threshold`: the score itself. `relative`: the score's share of the row's largest. `topk`: the
share of granules that are worse, so that level 1 - k / E keeps k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One rule.

    Attributes:
        values: from scores [.., E], where -inf marks granules that may not run.
        threshold: the op's threshold, from a level and E.
        moved: the level under a multiplier m(load), from both; the arrays broadcast.
        highest: the highest level that makes sense, or None where the scores say.
    """

    values: Callable[[Tensor], Tensor]
    threshold: Callable[[float, int], float]
    moved: Callable[[Tensor, Tensor], Tensor]
    highest: float | None = None


def _share_of_best(score: Tensor) -> Tensor:
    best = score.nan_to_num(nan=0.0).amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return score / best


def _share_of_worse(score: Tensor) -> Tensor:
    # A stable sort gives ties to the lowest index, as the op does; a NaN score counts as the best.
    count = score.shape[-1]
    infinite = float("inf")
    known = score.nan_to_num(nan=infinite, posinf=infinite, neginf=-infinite)
    order = known.sort(dim=-1, descending=True, stable=True).indices
    places = 1.0 - torch.arange(1, count + 1, dtype=torch.float32) / count
    worse = torch.empty_like(score).scatter_(-1, order, places.expand_as(score).contiguous())
    return torch.where(score == float("-inf"), score, worse)


def kept(level: float, granules: int) -> float:
    """k of a level: at least one granule, at most all."""
    return float(min(max(round((1.0 - level) * granules), 1), granules))


AXES: dict[str, Axis] = {
    "threshold": Axis(lambda score: score, lambda level, _: float(np.float32(level)), lambda level, m: level * m),
    "relative": Axis(_share_of_best, lambda level, _: float(np.float32(level)), lambda level, m: level * m, 1.0),
    "topk": Axis(_share_of_worse, kept, lambda level, m: 1.0 - ((1.0 - level) / m).clamp(max=1.0), 1.0),
}
