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
        order = np.argsort(-values, kind="stable")
        if settings.top_k:
            order = order[: settings.top_k]
        weights = np.exp((values[order] - values[best]) / settings.temperature)
        share = np.cumsum(weights) / weights.sum()
        # The first token that reaches top_p is kept, so at least one always is.
        kept = min(int(np.searchsorted(share, settings.top_p)) + 1, len(order))
        point = generator.random() * share[kept - 1]
        return int(order[min(int(np.searchsorted(share[:kept], point, side="right")), kept - 1)])
