"""Budgets: what is read, what is refused, and when one is kept."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clada_export.errors import UsageError
from clada_export.plan.goal import DEFAULT_BUDGET, Budget, Goal


@dataclass(frozen=True)
class Measured:
    """A drift as a budget sees it."""

    ppl_increase_bound: float
    kl_bound: float


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("ppl=2%", {"ppl": 0.02}),
        (" kl = 0.05 ", {"kl": 0.05}),
        ("ppl=0.5%", {"ppl": 0.005}),
        ("kl=1e-3", {"kl": 1e-3}),
        ("cett=0.2", {"cett": 0.2}),
        ("ppl=2%,kl=0.05", {"ppl": 0.02, "kl": 0.05}),
        (" kl=.05 , ppl = 2 %", {"ppl": 0.02, "kl": 0.05}),
    ],
)
def test_budgets(text: str, limits: dict[str, float]) -> None:
    budget = Budget.parse(text)
    assert budget.limits == pytest.approx(limits)
    assert Budget.parse(str(budget)) == budget
    assert Goal.parse(str(budget)).budget == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppl=0%", "ppl is out of range, it must be above 0% and below 100%"),
        ("ppl=200%", "ppl is out of range"),
        ("ppl=100%", "ppl is out of range"),
        ("ppl=2", "a perplexity budget is given in percent, like ppl=2%"),
        ("kl=0", "kl is out of range, it must be above 0 and below 2 nats"),
        ("kl=5%", "kl is given as a plain number, like kl=0.05"),
        ("kl=-1", "is not understood"),
        ("", "is not understood"),
        ("accuracy=1%", "'accuracy' is not known"),
        ("ppl=nan%", "is not understood"),
        ("kl=3", "kl is out of range"),
        ("cett=1", "cett is out of range"),
        ("cett=20%", "cett is given as a plain number, like cett=0.2"),
        ("ppl=2%,ppl=3%", "bounds ppl twice; give it one limit"),
        ("ppl=2%,", "has an empty part"),
        (",kl=0.1", "has an empty part"),
        ("ppl=2%,,kl=0.1", "has an empty part"),
        (" , ", "has an empty part"),
        ("ppl=2%;kl=0.1", "is not understood"),
        ("ppl=2% kl=0.1", "is not understood"),
        ("ppl=2%,top1=0.9", "'top1' is not known"),
        ("kl=0.1,cett=0.2", "a CETT bounds every FFN and not the drift; give it alone"),
        ("ppl=2%,kl=3", "kl is out of range"),
    ],
)
def test_budgets_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Budget.parse(text)
    assert str(caught.value).startswith(f"--budget {text!r}") and message in str(caught.value)


@given(st.floats(-0.5, 1.0), st.floats(0.0, 0.5))
def test_all_bounds_must_hold_and_the_nearest_is_the_cost(rise: float, kl: float) -> None:
    drift = Measured(rise, kl)
    both = Budget(ppl=0.02, kl=0.05)
    assert both.keeps(drift) == (rise <= 0.02 and kl <= 0.05)
    assert both.keeps(drift) == (Budget(ppl=0.02).keeps(drift) and Budget(kl=0.05).keeps(drift))
    assert both.shares(drift) == pytest.approx((rise / 0.02, kl / 0.05))
    assert both.cost(drift) == max(Budget(ppl=0.02).cost(drift), Budget(kl=0.05).cost(drift))


def test_a_budget_tells_a_drift_in_its_own_words() -> None:
    drift = Measured(0.031, 0.0123456)
    assert Budget(ppl=0.02, kl=0.05).told(drift) == "ppl=3.100%,kl=0.01235"
    assert Budget(kl=0.05).told(drift) == "kl=0.01235"


def test_the_default_bounds_perplexity_and_divergence() -> None:
    assert set(Budget.parse(DEFAULT_BUDGET).limits) == {"ppl", "kl"}
