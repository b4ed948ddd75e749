"""The plan survives a round trip, and nothing that is not a plan is taken for one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clada_export.errors import UsageError
from clada_export.load.signal import LoadSignal
from clada_export.plan.layer import LayerPlan
from clada_export.plan.plan import SparsityPlan


def make_plan() -> SparsityPlan:
    layers = tuple(
        LayerPlan(
            f"model.layers.{index}.mlp.down_proj",
            "silu",
            True,
            64,
            96 * (index + 1),
            (0.25,),
            0.25,
            0.25,
            4.0,
            0.5 * index,
            0.1,
        )
        for index in range(2)
    )
    return SparsityPlan(
        "clada", "shadow", "threshold", layers, LoadSignal(3.0, 2.0, 4.0, 1.0, 0.2, 0.0), {"weights_digest": "00"}
    )


def test_round_trip(tmp_path: Path) -> None:
    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    assert SparsityPlan.load_file(tmp_path / "plan.json") == plan


def test_expected_sparsity_is_weighted_by_size() -> None:
    assert make_plan().expected_sparsity == pytest.approx((96 * 0.0 + 192 * 0.5) / 288)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: plan.update(version=2), "version"),
        (lambda plan: plan.update(score="magic"), "score"),
        (lambda plan: plan.pop("load"), "load"),
        (lambda plan: plan["layers"][1].update(threshold=[-1.0]), "layers/1/threshold/0"),
        (lambda plan: plan["layers"][0].update(threshold=[]), "layers/0/threshold"),
        (lambda plan: plan["layers"][0].update(typo=1), "layers/0"),
        (lambda plan: plan["layers"].append(copy.deepcopy(plan["layers"][0])), "planned twice"),
        (lambda plan: plan["layers"][0].update(load_min=5.0), "load_min"),
        (lambda plan: plan["load"].update(entropy_std=0), "load/entropy_std"),
    ],
)
def test_faults_are_named(tmp_path: Path, change: Any, said: str) -> None:
    value = make_plan().to_dict()
    change(value)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(UsageError, match=said) as caught:
        SparsityPlan.load_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2", '{"version": NaN}', "\x00", "[" * 100_000])
def test_what_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="not valid JSON"):
        SparsityPlan.load_file(path)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += _places(item, (*path, key))
    return found


junk = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2))


@given(st.data())
def test_any_change_gives_a_plan_or_a_usage_error(data: st.DataObject) -> None:
    value = make_plan().to_dict()
    place = data.draw(st.sampled_from(_places(value)))
    target = value
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = data.draw(junk)
    try:
        plan = SparsityPlan.from_dict(value)
    except UsageError:
        return
    assert SparsityPlan.from_dict(plan.to_dict()) == plan
