"""The user's error budget, and the search for the highest sparsity that keeps it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from clada_export.calibration.drift import Drift
from clada_export.errors import UsageError
from clada_export.plan.goal import Budget

LOWEST, HIGHEST = 0.02, 0.95


class BudgetUnmetError(UsageError):
    """Nothing keeps the budget. `cost` is the least that was measured, in the budget's unit, at `sparsity`."""

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
    """One measurement of the search."""

    sparsity: float
    cost: float
    drift: Drift


def search_sparsity(
    budget: Budget, measure: Callable[[float], Drift], *, first: float, tolerance: float = 0.01, steps: int = 7
) -> tuple[SearchStep, list[SearchStep]]:
    """The highest sparsity whose cost is within the budget.

    Cost grows roughly as a power of sparsity, so the next guess comes from a power law through the last two measurements. It
    falls back to bisection when the guesses keep landing on one side.

    Args:
        measure: the drift at a sparsity.
        first: where to begin.
        tolerance: the width of the bracket at which the search ends.

    Returns:
        The step that was taken, and all of them.

    Raises:
        BudgetUnmetError: not even the lowest sparsity keeps the budget; says what it costs.
    """
    low: SearchStep | None = None
    high = HIGHEST
    history: list[SearchStep] = []
    guess = min(max(first, LOWEST), HIGHEST)
    for _ in range(steps):
        drift = measure(guess)
        step = SearchStep(guess, budget.cost(drift), drift)
        history.append(step)
        if step.cost <= budget.limit:
            low = step
            if guess >= HIGHEST:
                break
        else:
            high = guess
        floor = low.sparsity if low else LOWEST
        if high - floor <= tolerance:
            break
        # A tight bracket is halved: there, noise decides and not the power law.
        one_sided = len(history) >= 3 and len({item.cost <= budget.limit for item in history[-3:]}) == 1
        if one_sided or high - floor < 4 * tolerance:
            guess = (floor + high) / 2
        else:
            margin = (high - floor) / 8
            guess = min(max(_power_law(history, budget.limit), floor + margin), high if high == HIGHEST else high - margin)
    if low is None:
        drift = measure(LOWEST)
        low = SearchStep(LOWEST, budget.cost(drift), drift)
        history.append(low)
        if low.cost > budget.limit:
            raise BudgetUnmetError(
                f"no sparsity keeps the budget {budget}: {LOWEST:.0%} already costs {low.cost:.4g} on the held-out text. "
                "Give a larger --budget, or more calibration text",
                low.cost,
                LOWEST,
            )
    return low, history


def _power_law(history: list[SearchStep], limit: float) -> float:
    """The sparsity at which a power law through the last two measurements reaches the limit."""
    last = history[-1]
    exponent = 4.0
    if len(history) > 1:
        before = history[-2]
        if min(last.cost, before.cost) > 0 and last.sparsity != before.sparsity:
            exponent = math.log(last.cost / before.cost) / math.log(last.sparsity / before.sparsity)
            exponent = min(max(exponent, 1.0), 8.0)
    return last.sparsity * float((limit / last.cost) ** (1 / exponent)) if last.cost > 0 else HIGHEST


__all__ = ["HIGHEST", "LOWEST", "Budget", "BudgetUnmetError", "SearchStep", "parse_sparsity", "search_sparsity"]
