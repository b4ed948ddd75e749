"""How a plan was made, as typed fields and as the JSON of a plan: both ways, in the order in which it was always written."""

from __future__ import annotations

import json

import pytest

from clada_export.errors import UsageError
from clada_export.plan.goal import Budget, Goal
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.record import (
    CalibrationRecord,
    ComparedVariant,
    PolicyChoice,
    PolicyRow,
    SearchedSparsity,
    TriedResponse,
)

ROW = PolicyRow("tt", "chosen", "tt", "cett", 0.5, 0.01, 0.02, 0.02, 0.7, 1.5, chosen=True)
RECORD = CalibrationRecord(
    text="a text",
    digest="00",
    calibration_tokens=64,
    context=32,
    heldout_tokens=64,
    prompt_tokens=8,
    goal=Goal.of(Budget(ppl=0.02), None),
    variant="tt",
    allocation="cett",
    compared=(ComparedVariant("tt", "cett", 0.01, 0.45),),
    search=(SearchedSparsity(0.5, 0.9, 0.01, 0.018),),
    load_response=(TriedResponse("surprisal", 0.1, 0.01, 0.011, 0.001, -1.0, 0.5, better=False),),
    details={"training": {"rows": 3, "layers": {"a": {"losses": [1.0, 0.5]}}}},
    drift={"kl": 0.01, "ppl": None},
    pruning={"spec": "x=0.5", "text_digest": "00"},
    relative_bytes=0.7,
    auto=PolicyChoice("ppl=2.0000%", "the fewest bytes", "tt", (ROW,), {"left_out": "no library"}, "tt of 1 policies"),
)
WRITTEN = [
    *("text", "digest", "calibration_tokens", "context", "heldout_tokens", "prompt_tokens", "budget", "variant", "allocation"),
    *("compared", "search", "load_response", "training", "drift", "pruning", "relative_bytes", "auto"),
]


def plan_json(**calibration: object) -> dict[str, object]:
    load = dict.fromkeys(("surprisal_mean", "entropy_mean", "surprisal_weight", "entropy_weight"), 0.0)
    return {
        **{"version": 1, "policy": "tt", "score": "exact", "rule": "threshold", "layers": []},
        "load": {**load, "surprisal_std": 1.0, "entropy_std": 1.0},
        "source": {"weights_digest": "0"},
        "calibration": calibration,
    }


def test_a_record_comes_back_from_json_as_it_was() -> None:
    value = json.loads(json.dumps(RECORD.to_dict(), allow_nan=False))
    assert list(value) == WRITTEN
    assert CalibrationRecord.from_dict(value) == RECORD
    assert SparsityPlan.from_dict(plan_json(**value)).calibration == RECORD


def test_what_a_record_does_not_know_is_not_written() -> None:
    assert CalibrationRecord().to_dict() == {} and CalibrationRecord.from_dict({}) == CalibrationRecord()
    assert CalibrationRecord(goal=Goal.of_import()).to_dict() == {"budget": "imported"}


def test_what_a_policy_tells_is_kept_as_it_is() -> None:
    told = {"trained on": {"rows": 3}, "nothing": None, "details": [1]}
    record = CalibrationRecord.from_dict({"text": "a", **told})
    assert record.details == told and record.to_dict() == {"text": "a", **told}


def test_fields_of_a_later_version_do_no_harm() -> None:
    record = CalibrationRecord.from_dict(
        {"search": [{"sparsity": 0.5, "cost": 0.1, "kl": 0.1, "later": 1}], "auto": {"later": 1}}
    )
    assert record.search == (SearchedSparsity(0.5, 0.1, 0.1),) and record.auto == PolicyChoice()


@pytest.mark.parametrize(
    "text", ["ppl=2%", "kl=0.05", "kl=0.05, ppl=2%", "cett=0.2", "sparsity=0.5", "imported", "by hand", "", "a=b"]
)
def test_a_goal_says_what_the_plan_says(text: str) -> None:
    goal = Goal.parse(text)
    assert str(goal) == text
    assert goal.imported == (text == "imported")
    assert (goal.budget is not None) == text.startswith(("ppl", "kl", "cett"))


@pytest.mark.parametrize(
    ("goal", "limits"),
    [
        (Goal.of(Budget(ppl=0.02), None), {"ppl_increase": 0.02}),
        (Goal.of(Budget(kl=0.05), None), {"kl": 0.05}),
        (Goal.of(Budget(ppl=0.02, kl=0.05), None), {"ppl_increase": 0.02, "kl": 0.05}),
        (Goal.of(Budget(cett=0.2), None), {}),
        (Goal.of(Budget(kl=0.05), 0.5), {}),
        (Goal.of_import(), {}),
    ],
)
def test_a_budget_of_drift_limits_the_engine_too(goal: Goal, limits: dict[str, float]) -> None:
    assert goal.drift_limits == limits == Goal.parse(str(goal)).drift_limits


@pytest.mark.parametrize("budget", ["ppl=5", "kl=3", "ppl=much%", "kl=", "ppl=2%,", "kl=0.1,by hand", "cett=0.2,kl=0.1"])
def test_a_budget_that_is_none_is_refused_where_the_plan_is_read(budget: str) -> None:
    with pytest.raises(UsageError, match=r"^mine: --budget "):
        SparsityPlan.from_dict(plan_json(budget=budget), origin="mine")
