"""Choosing the next token from raw logits, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clada_export.errors import UsageError, VerificationError


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
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise UsageError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; it must be 0 (off) or positive")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed is {self.seed}; it must not be negative")


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
            raise VerificationError(
                "the model returned no finite logit for a row; the engine is damaged or its numbers overflow"
            )
        settings = self.settings
        if settings.temperature == 0:
            return best
        tokens = _best(values, settings.top_k) if settings.top_k else np.arange(len(values))
        weights = np.exp((values[tokens] - values[best]) / settings.temperature)
        if settings.top_p < 1:
            kept = _nucleus(weights, settings.top_p)
            tokens, weights = tokens[kept], weights[kept]
        share = np.cumsum(weights)
        point = generator.random() * share[-1]
        return int(tokens[min(int(np.searchsorted(share, point, side="right")), len(tokens) - 1)])


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
