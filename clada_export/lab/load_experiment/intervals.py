"""Confidence intervals of paired differences, over documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its 95% interval."""

    mean: float
    low: float
    high: float


def paired_interval(differences: np.ndarray, seed: int = 0) -> Interval:
    """The mean of differences [documents] and its percentile bootstrap interval: documents are drawn with replacement.

    Tokens of one document depend on each other, so documents are what is drawn. One document has no interval: its bounds are
    infinite.
    """
    mean = float(differences.mean())
    if len(differences) < 2:
        return Interval(mean, float("-inf"), float("inf"))
    drawn = np.random.default_rng(seed).integers(0, len(differences), (DRAWS, len(differences)))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(differences[drawn].mean(axis=1), [tail, 1 - tail])
    return Interval(mean, float(low), float(high))
