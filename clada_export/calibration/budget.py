"""The search for the highest sparsity that keeps the user's error budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clada_export.calibration.drift import Drift
from clada_export.errors import UsageError
from clada_export.plan.goal import Budget

LOWEST, HIGHEST = 0.02, 0.95
STEPS = 6
"""Measurements of a search, at most."""
WIDTH = 0.01
"""A search ends when its bracket is as narrow, in sparsity,"""
NEAR = 0.1
"""or when no more than this share of the limit is left."""

_AIM = math.log(1.0 - NEAR / 2)
"""Where the guesses aim, as log share of the limit: the middle of what ends the search."""
_NOISE = 0.05
"""What costs less of its limit is hardly told apart: there noise decides, and a share may be negative."""
_SLOPES = 0.25, 4.0
"""How much faster or slower than predicted a cost is believed to grow beyond what was measured."""
_CLOSE = 1.5
"""Within this factor of the limit a line may lead there, however wide the bracket still is."""
_OVER = 0.3
"""How far past the aim a guess goes, as log share, for each measurement before it that stayed on the same side."""
_POWER = 4.0
"""Cost grows roughly as this power of sparsity where nothing better is known."""
_PLACES = 24


class BudgetUnmetError(UsageError):
    """Nothing keeps the budget. `cost` is the least that was measured, as a share of its limit, at `sparsity`."""

    def __init__(self, message: str, cost: float, sparsity: float) -> None:
        super().__init__(message)
        self.cost, self.sparsity = cost, sparsity

    def __reduce__(self) -> tuple[type[BudgetUnmetError], tuple[str, float, float]]:
        return type(self), (str(self), self.cost, self.sparsity)


def parse_sparsity(value: float) -> float:
    """Check `--sparsity`.

    Raises:
        UsageError: not between 0 and 0.95.
    """
    if not (math.isfinite(value) and 0.0 < value <= HIGHEST):
        raise UsageError(f"--sparsity {value:g} is out of range: it must be above 0 and at most {HIGHEST}")
    return value


@dataclass(frozen=True)
class SearchStep:
    """One measurement of the search: `shares` of the budget's limits, in their order (`Budget.shares`)."""

    sparsity: float
    drift: Drift
    shares: tuple[float, ...]
    kept: bool

    @property
    def cost(self) -> float:
        """The largest share of its limit."""
        return max(self.shares)


def power_law(sparsity: float) -> float:
    """A prediction of cost where there is none."""
    return float(sparsity**_POWER)


def search_sparsity(
    budget: Budget,
    measure: Callable[[float], Drift],
    *,
    first: float,
    predicted: Callable[[float], float] = power_law,
) -> tuple[SearchStep, list[SearchStep]]:
    """The highest sparsity that was measured to be within the budget.

    A guess is where the log of each bound's cost, as a line over the log of the predicted cost, reaches its limit; the lowest
    of the bounds decides. The line goes through the two ends of the bracket, the end that stays counting half each time (the
    Illinois rule: Dowell and Jarratt 1971, https://doi.org/10.1007/BF01934364), and before there is a bracket it has the
    prediction's slope or that of the last two measurements. Where lines lead nowhere, the bracket is halved. The cost need not
    rise everywhere, and may be negative.

    No sparsity is measured twice. The search ends when its bracket is `WIDTH` wide, when the best has less than `NEAR` of a
    limit left, or after `STEPS` measurements.

    Args:
        measure: the drift at a sparsity.
        first: where to begin.
        predicted: the cost expected at a sparsity, in any unit; only how it grows matters.

    Returns:
        The step that was taken, and all of them.

    Raises:
        BudgetUnmetError: not even the lowest sparsity keeps the budget; says what it costs.
    """
    search = _Search(_Places(predicted))
    guess = min(max(first, LOWEST), HIGHEST)
    while True:
        drift = measure(guess)
        search.add(SearchStep(guess, drift, budget.shares(drift), budget.keeps(drift)))
        if search.low is None and guess <= LOWEST:
            raise BudgetUnmetError(
                f"no sparsity keeps the budget {budget}: {LOWEST:.0%} already costs {budget.told(drift)} on the held-out text. "
                "Give a larger --budget, or more calibration text",
                budget.cost(drift),
                guess,
            )
        if search.low is not None and search.ended():
            return search.low, search.steps
        guess = search.guess()


class _Places:
    """Sparsity on an axis where the predicted cost is exponential: its logarithm, made to rise everywhere."""

    def __init__(self, predicted: Callable[[float], float]) -> None:
        self._sparsity = np.linspace(LOWEST, HIGHEST, _PLACES)
        costs = np.array([predicted(float(sparsity)) for sparsity in self._sparsity], dtype=np.float64)
        costs = np.maximum.accumulate(np.nan_to_num(costs, nan=0.0, posinf=np.finfo(np.float64).max))
        # A prediction that is flat, or 0 for a while, says nothing there: what is left is a slow power law.
        positive = costs[costs > 0]
        logs = np.log(np.maximum(costs, positive[0] if len(positive) else 1.0))
        self._place = logs + 0.5 * np.log(self._sparsity)

    def of(self, sparsity: float) -> float:
        return float(np.interp(sparsity, self._sparsity, self._place))

    def sparsity(self, place: float) -> float:
        return float(np.interp(place, self._place, self._sparsity))


class _Search:
    """What was measured, and the bracket: the highest sparsity that kept the budget, and the lowest that did not."""

    def __init__(self, places: _Places) -> None:
        self._places = places
        self.steps: list[SearchStep] = []
        self.low: SearchStep | None = None
        self.high: SearchStep | None = None
        self._stays = 0
        self._widths: list[float] = []

    def add(self, step: SearchStep) -> None:
        same_side = bool(self.steps) and self.steps[-1].kept == step.kept
        self._stays = self._stays + 1 if same_side else 0
        self.steps.append(step)
        if step.kept:
            self.low = step
        else:
            self.high = step
        if self.low is not None and self.high is not None:
            self._widths.append(self.high.sparsity - self.low.sparsity)

    @property
    def _left(self) -> float:
        return LOWEST if self.low is None else self.low.sparsity

    @property
    def _right(self) -> float:
        return HIGHEST if self.high is None else self.high.sparsity

    def ended(self) -> bool:
        assert self.low is not None
        near = self.low.cost >= 1.0 - NEAR
        return near or self._right - self._left <= WIDTH or len(self.steps) >= STEPS

    def guess(self) -> float:
        """The next sparsity, one that was not measured."""
        left, right = self._left, self._right
        if self.low is None and len(self.steps) >= STEPS - 1:
            return LOWEST
        place = min(self._reached(bound) for bound in range(len(self.steps[0].shares)))
        guess = self._places.sparsity(place)
        if self.low is None or self.high is None:
            # Beside an end that was not measured, the end itself says more.
            if self.low is None and guess < left + WIDTH:
                return left
            if self.high is None and guess > right - WIDTH:
                return right
        elif self._stuck():
            guess = (left + right) / 2
        margin = min(WIDTH / 2, (right - left) / 4)
        return min(max(guess, left + margin), right - margin)

    def _stuck(self) -> bool:
        """Whether lines lead nowhere: the end that moves comes no nearer to the limit, or both it and the bracket are far."""
        last, before = (abs(math.log(max(step.cost, _NOISE))) for step in (self.steps[-1], self.steps[-2]))
        nearer = last < 0.8 * before
        if self._stays:
            return not nearer or (self._slow and last > math.log(_CLOSE))
        return self._slow

    @property
    def _slow(self) -> bool:
        """Whether two guesses did not halve the bracket."""
        return len(self._widths) > 2 and self._widths[-1] > self._widths[-3] / 2

    def _reached(self, bound: int) -> float:
        """The place where one bound's cost is expected to reach its limit, infinite if nowhere."""
        aim = _AIM
        if self.low is not None and self.high is not None:
            lower, upper = (self._point(step, bound) for step in (self.low, self.high))
            # The end that stays is taken to be nearer to the aim than it is, or the other would come in small steps.
            factor = 0.5**self._stays
            if self.steps[-1].kept:
                upper = upper[0], aim + (upper[1] - aim) * factor
            else:
                lower = lower[0], aim + (lower[1] - aim) * factor
            rise = upper[1] - lower[1]
            return lower[0] + (aim - lower[1]) * (upper[0] - lower[0]) / rise if rise > 0 else math.inf
        place, height = self._point(self.steps[-1], bound)
        slope = 1.0
        if len(self.steps) > 1:
            before = self._point(self.steps[-2], bound)
            slope = (height - before[1]) / (place - before[0])
            slope = min(max(slope, _SLOPES[0]), _SLOPES[1])
        # Step by step from one side a bracket would come late: each that stays there aims further over to the other.
        aim += (_OVER if self.low is not None else -_OVER) * self._stays
        return place + (aim - height) / slope

    def _point(self, step: SearchStep, bound: int) -> tuple[float, float]:
        """(place, log share of the limit)."""
        share = max(step.shares[bound], 0.0)
        return self._places.of(step.sparsity), math.log((share + _NOISE) / (1.0 + _NOISE))


__all__ = ["HIGHEST", "LOWEST", "Budget", "BudgetUnmetError", "SearchStep", "parse_sparsity", "power_law", "search_sparsity"]
