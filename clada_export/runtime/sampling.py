"""Choosing the next token from raw logits, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clada_export.errors import UsageError, VerificationError, shown

LARGEST_SEED = 2**64 - 1
_LARGEST = float(np.finfo(np.float64).max) / 4
"""Of logits after the penalty: differences of two stay finite."""
NO_FINITE_LOGIT = "the model returned no finite logit for a row; the engine is damaged or its numbers overflow"


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen: as transformers does it, in its order (`transformers/generation/logits_process.py`).

    `repetition_penalty` r divides a positive logit by r, and multiplies a negative one with it, for every token that is in the
    row's prompt or text already (Keskar et al. 2019, CTRL, section 4.1); also where the choice is greedy. 1 is off. Temperature
    0 is greedy. `top_k` 0 and `top_p` 1 switch these filters off (nucleus: Holtzman et al. 2020). `min_p` drops tokens less
    likely than min_p times the most likely one (Nguyen et al. 2024); 0 is off.

    Raises:
        UsageError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or self.temperature < 0:
            raise UsageError(f"temperature is {shown(self.temperature)}; it must be 0 (greedy) or a positive number")
        if not _is_whole(self.top_k) or self.top_k < 0:
            raise UsageError(f"top_k is {shown(self.top_k)}; it must be 0 (off) or a positive whole number")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {shown(self.top_p)}; it must be above 0 and at most 1")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p is {shown(self.min_p)}; it must be from 0 (off) to 1")
        if not _is_number(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise UsageError(f"repetition_penalty is {shown(self.repetition_penalty)}; it must be a positive number, 1 is off")
        if self.seed is not None and (not _is_whole(self.seed) or not 0 <= self.seed <= LARGEST_SEED):
            raise UsageError(f"seed is {shown(self.seed)}; it must be a whole number from 0 to {LARGEST_SEED} (2^64 - 1)")


class Sampler:
    """Chooses tokens. Every row has a random generator of its own, so that a row's text does not depend on the other rows.

    Args:
        settings: temperature, filters, penalty and seed.
        batch: number of rows.
        prompts: token ids of each row, for the penalty; None if there are none.
    """

    def __init__(self, settings: SamplingSettings, batch: int, prompts: Sequence[Sequence[int]] | None = None) -> None:
        self.settings = settings
        self._prompts = prompts
        self._seen: npt.NDArray[np.bool_] | None = None
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
        values = np.where(np.isfinite(logits), logits, -np.inf).astype(np.float64)
        if self.settings.repetition_penalty == 1:
            return self._choose(values)
        if self._seen is None:
            self._seen = _seen(self._prompts, values.shape)
        chosen = self._choose(_penalised(values, self._seen, float(self.settings.repetition_penalty)))
        self._seen[np.arange(len(chosen)), chosen] = True
        return chosen

    def _choose(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        return np.array([self._choose_row(row, generator) for row, generator in zip(values, self._generators, strict=True)])

    def _choose_row(self, values: npt.NDArray[np.float64], generator: np.random.Generator) -> int:
        best = int(values.argmax())
        if values[best] == -np.inf:
            raise VerificationError(NO_FINITE_LOGIT)
        if self.settings.temperature == 0:
            return best
        tokens, weights = candidates(values, self.settings)
        share = np.cumsum(weights)
        point = generator.random() * share[-1]
        return int(tokens[min(int(np.searchsorted(share, point, side="right")), len(tokens) - 1)])


def candidates(
    values: npt.NDArray[np.float64], settings: SamplingSettings
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that may be drawn, and how likely they are next to the best, which has 1.

    Args:
        values: [V], penalised, and at least one of them finite; -inf is impossible.
        settings: with a temperature above 0.
    """
    tokens = _best(values, settings.top_k) if settings.top_k else np.arange(len(values))
    with np.errstate(over="ignore"):  # a temperature next to 0: all but the best have no weight
        weights = np.exp((values[tokens] - values.max()) / settings.temperature)
    if settings.top_p < 1:
        kept = _nucleus(weights, settings.top_p)
        tokens, weights = tokens[kept], weights[kept]
    if settings.min_p > 0:
        likely = weights >= settings.min_p
        tokens, weights = tokens[likely], weights[likely]
    return tokens, weights


def _seen(prompts: Sequence[Sequence[int]] | None, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """[B, V]: which tokens are in a row's prompt."""
    seen = np.zeros(shape, np.bool_)
    for row, prompt in zip(seen, prompts or [], strict=False):
        row[[token for token in prompt if token < len(row)]] = True
    return seen


def _penalised(values: npt.NDArray[np.float64], seen: npt.NDArray[np.bool_], penalty: float) -> npt.NDArray[np.float64]:
    """Logits [B, V] with those of seen tokens lowered (raised, for a penalty below 1); what is finite stays finite."""
    with np.errstate(over="ignore"):
        changed = np.where(values < 0, values * penalty, values / penalty)
    return np.where(seen & np.isfinite(values), np.clip(changed, -_LARGEST, _LARGEST), values)


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
