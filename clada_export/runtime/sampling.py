"""Choosing the next token from raw logits, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clada_export.errors import UsageError, VerificationError, shown

LARGEST_SEED = 2**64 - 1
NO_FINITE_LOGIT = "the model returned no finite logit for a row; the engine is damaged or its numbers overflow"


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 switch these filters off.

    Raises:
        UsageError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or self.temperature < 0:
            raise UsageError(f"temperature is {shown(self.temperature)}; it must be 0 (greedy) or a positive number")
        if not _is_whole(self.top_k) or self.top_k < 0:
            raise UsageError(f"top_k is {shown(self.top_k)}; it must be 0 (off) or a positive whole number")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {shown(self.top_p)}; it must be above 0 and at most 1")
        if self.seed is not None and (not _is_whole(self.seed) or not 0 <= self.seed <= LARGEST_SEED):
            raise UsageError(f"seed is {shown(self.seed)}; it must be a whole number from 0 to {LARGEST_SEED} (2^64 - 1)")


class Sampler:
    """Chooses tokens. Every row has a random generator of its own, so that a row's text does not depend on the other rows.

    Args:
        settings: temperature, filters and seed.
        batch: number of rows.
    """

    def __init__(self, settings: SamplingSettings, batch: int) -> None:
        self.settings = settings
        seeds = np.random.SeedSequence(settings.seed).spawn(batch)
        self._generators = [np.random.default_rng(seed) for seed in seeds]

    def choose(self, logits: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        """One token a row.

        Args:
            logits: [B, V], raw.

        Returns:
            [B] token ids.

        Raises:
            VerificationError: a row has no finite logit.
        """
        return np.array([self._choose_row(row, generator) for row, generator in zip(logits, self._generators, strict=True)])

    def _choose_row(self, row: npt.NDArray[np.floating], generator: np.random.Generator) -> int:
        values = np.where(np.isfinite(row), row, -np.inf).astype(np.float64)
        best = int(values.argmax())
        if values[best] == -np.inf:
            raise VerificationError(NO_FINITE_LOGIT)
        settings = self.settings
        if settings.temperature == 0:
            return best
        tokens = _best(values, settings.top_k) if settings.top_k else np.arange(len(values))
        with np.errstate(over="ignore"):  # a temperature next to 0: all but the best have no weight
            weights = np.exp((values[tokens] - values[best]) / settings.temperature)
        if settings.top_p < 1:
            kept = _nucleus(weights, settings.top_p)
            tokens, weights = tokens[kept], weights[kept]
        share = np.cumsum(weights)
        point = generator.random() * share[-1]
        return int(tokens[min(int(np.searchsorted(share, point, side="right")), len(tokens) - 1)])


def _is_number(value: Any) -> bool:
    """Whether it is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _best(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """The indices of the `count` largest values, the largest first; ties go to the lowest index."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    smallest = np.partition(values, len(values) - count)[len(values) - count]
    candidates = np.flatnonzero(values >= smallest)
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _nucleus(weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.int64]:
    """The indices of the fewest weights that make up `top_p` of the sum: at least one, the largest first."""
    total = weights.sum()
    # All weights below this together stay under 1 - top_p, so none is needed; a vocabulary is too long to sort whole.
    candidates = np.flatnonzero(weights >= total * (1 - top_p) / len(weights))
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    share = np.cumsum(weights[order]) / total
    return order[: int(np.searchsorted(share, top_p)) + 1]
