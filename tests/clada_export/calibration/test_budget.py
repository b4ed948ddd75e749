"""The search for the highest sparsity within a budget: how near it ends, what it takes, and what no cost may make it do."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clada_export.calibration.budget import (
    HIGHEST,
    LOWEST,
    NEAR,
    STEPS,
    WIDTH,
    BudgetUnmetError,
    SearchStep,
    power_law,
    search_sparsity,
)
from clada_export.calibration.drift import Drift
from clada_export.plan.goal import Budget

LIMIT = 0.05
COMPARE_AT = 0.45
ANSWERS = st.floats(0.05, 0.93)
Cost = Callable[[float], float]


def drift(sparsity: float, kl: float, rise: float = 0.0) -> Drift:
    """Of two equal tokens, so that no standard error is added."""
    return Drift(np.full(2, math.log1p(rise)), np.zeros(2), np.full(2, kl), np.ones(2), np.zeros(2), sparsity)


def search(cost: Cost, predicted: Cost = power_law, first: float = COMPARE_AT) -> tuple[SearchStep, list[SearchStep]]:
    """Search under a cost, given as share of the limit, and hold the search to what it promises for any."""
    asked: list[float] = []

    def measure(sparsity: float) -> Drift:
        asked.append(sparsity)
        return drift(sparsity, cost(sparsity) * LIMIT)

    try:
        found, steps = search_sparsity(Budget(kl=LIMIT), measure, first=first, predicted=predicted)
    finally:
        assert len(set(asked)) == len(asked) <= STEPS
        assert all(LOWEST <= sparsity <= HIGHEST for sparsity in asked) and asked[0] == first
    assert [step.sparsity for step in steps] == asked
    # What is taken was measured, and is the highest that was within the budget.
    kept = [step for step in steps if step.drift.kl_bound <= LIMIT]
    assert found is max(kept, key=lambda step: step.sparsity)
    return found, steps


def ends_near(found: SearchStep, answer: float) -> bool:
    """Whether a search ended within a point of sparsity, or a tenth of the limit (rounding aside)."""
    return answer - found.sparsity <= WIDTH + 1e-9 or found.cost >= 1.0 - NEAR - 1e-9


@given(ANSWERS, st.floats(2, 8), st.floats(0.2, 0.9))
def test_power_laws_from_anywhere(answer: float, power: float, first: float) -> None:
    found, _ = search(lambda sparsity: (sparsity / answer) ** power, first=first)
    assert answer - found.sparsity <= 0.12


@given(ANSWERS, st.floats(2, 8))
def test_power_laws(answer: float, power: float) -> None:
    found, _ = search(lambda sparsity: (sparsity / answer) ** power)
    assert ends_near(found, answer)


@given(ANSWERS, st.floats(4, 15))
def test_exponentials(answer: float, rate: float) -> None:
    found, _ = search(lambda sparsity: math.exp(rate * (sparsity - answer)))
    assert ends_near(found, answer)


@given(st.floats(0.1, 0.9), st.floats(2, 5), st.floats(0.5, 3), st.floats(0.7, 1.4))
def test_costs_that_were_predicted(answer: float, power: float, end: float, off: float) -> None:
    """Costs as models have them, up to a factor and an exponent of what was predicted."""

    def shape(sparsity: float) -> float:
        return float(sparsity**power / (1 - sparsity) ** end)

    found, steps = search(
        lambda sparsity: (shape(sparsity) / shape(answer)) ** off, predicted=lambda sparsity: 1e-7 * shape(sparsity)
    )
    assert ends_near(found, answer)
    assert len(steps) <= 5


@given(st.floats(0.5, 0.93), st.floats(3, 6), st.floats(0.5, 3))
def test_costs_that_fall_below_zero_first(answer: float, power: float, dip: float) -> None:
    """A perplexity that gets better before it gets worse."""
    found, _ = search(lambda sparsity: (sparsity / answer) ** power * (1 + dip) - dip * (sparsity / answer) ** 2)
    assert answer - found.sparsity <= 0.1


@given(st.integers(0, 2**32 - 1), ANSWERS, st.floats(2, 8))
def test_noise(seed: int, answer: float, power: float) -> None:
    generator = np.random.default_rng(seed)
    try:
        found, _ = search(lambda sparsity: (sparsity / answer) ** power * (1 + 0.1 * generator.standard_normal()))
    except BudgetUnmetError:
        assert answer < 0.1
        return
    assert abs(found.sparsity - answer) <= 0.2


@given(ANSWERS, st.floats(-1, 0.5), st.floats(1.01, 1e12))
def test_steps(answer: float, below: float, above: float) -> None:
    found, _ = search(lambda sparsity: below if sparsity < answer else above)
    assert answer - 0.3 <= found.sparsity < answer


@given(st.lists(st.floats(-1e6, 1e300), min_size=STEPS, max_size=STEPS), st.lists(st.floats(0, 1e300), min_size=3, max_size=3))
def test_any_numbers(costs: list[float], predictions: list[float]) -> None:
    """Whatever is measured and predicted: `search` holds what it says, or nothing was within the budget."""
    left = iter(costs)
    seen: list[float] = []

    def cost(sparsity: float) -> float:
        seen.append(next(left))
        return seen[-1]

    try:
        search(cost, predicted=lambda sparsity: predictions[int(sparsity * 3)])
    except BudgetUnmetError as error:
        assert min(seen) > 1.0 and error.sparsity == LOWEST and error.cost == pytest.approx(seen[-1])


@pytest.mark.parametrize("cost", [-0.5, 0.0, 0.01, 0.5])
def test_a_cost_that_stays_low_ends_at_the_highest_sparsity(cost: float) -> None:
    found, steps = search(lambda sparsity: cost)
    assert found.sparsity == HIGHEST
    assert len(steps) <= 4


@pytest.mark.parametrize(
    "predicted", [lambda sparsity: 0.0, lambda sparsity: math.nan, lambda sparsity: -sparsity, lambda s: 1e308]
)
def test_predictions_that_say_nothing_do_no_harm(predicted: Cost) -> None:
    found, _ = search(lambda sparsity: (sparsity / 0.6) ** 4, predicted=predicted)
    assert ends_near(found, 0.6)


def test_a_first_guess_within_a_tenth_of_the_limit_is_the_only_one() -> None:
    found, steps = search(lambda sparsity: 0.95, first=0.5)
    assert found.sparsity == 0.5 and len(steps) == 1


def test_a_budget_that_nothing_meets_says_what_the_least_costs() -> None:
    asked = []

    def measure(sparsity: float) -> Drift:
        asked.append(sparsity)
        return drift(sparsity, 0.5, rise=0.031)

    with pytest.raises(BudgetUnmetError, match=rf"{LOWEST:.0%} already costs ppl=3\.100%,kl=0\.5 on") as caught:
        search_sparsity(Budget(ppl=0.02, kl=0.1), measure, first=0.4)
    assert (caught.value.cost, caught.value.sparsity) == (pytest.approx(5.0), LOWEST)
    assert len(asked) == len(set(asked)) <= STEPS
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.cost, again.sparsity) == (str(caught.value), caught.value.cost, LOWEST)


@given(st.floats(0.1, 0.9), st.floats(0.1, 0.9), st.floats(2, 6), st.floats(2, 6))
def test_of_two_bounds_both_hold_and_the_nearer_decides(kl_at: float, ppl_at: float, kl_power: float, ppl_power: float) -> None:
    def measure(sparsity: float) -> Drift:
        return drift(sparsity, LIMIT * (sparsity / kl_at) ** kl_power, 0.02 * (sparsity / ppl_at) ** ppl_power)

    found, steps = search_sparsity(Budget(ppl=0.02, kl=LIMIT), measure, first=COMPARE_AT)
    assert found.drift.kl_bound <= LIMIT and found.drift.ppl_increase_bound <= 0.02
    assert found.cost == max(found.shares) <= 1.0
    assert ends_near(found, min(kl_at, ppl_at))
    assert len(steps) <= STEPS
