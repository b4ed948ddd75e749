"""The rules that turn surprisal and entropy into loads: their formulas, their memory, and that rows stay apart."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clada_export.errors import UsageError
from clada_export.load.controllers import CONTROLLERS, make_controller
from clada_export.load.signal import LoadSignal
from clada_export.load.tracker import LoadTracker, loads_along
from clada_export.plan.plan import SparsityPlan

BASE = LoadSignal(3.0, 2.0, 4.0, 1.5, 0.8, -0.3)
RANDOM = np.random.default_rng(0)
SURPRISAL, ENTROPY = RANDOM.gamma(1.5, 2.0, (4, 60)), RANDOM.gamma(3.0, 1.3, (4, 60))
DRIVE = 0.8 * (SURPRISAL - 3) / 2 - 0.3 * (ENTROPY - 4) / 1.5


def along(**changes: object) -> np.ndarray:
    return loads_along(replace(BASE, **changes), SURPRISAL, ENTROPY)  # type: ignore[arg-type]


def multiplier(load: np.ndarray, slope: float = 0.25) -> np.ndarray:
    """The op's, within its bounds."""
    return np.exp(-slope * load)


def test_closed_forms() -> None:
    np.testing.assert_allclose(along(), np.clip(DRIVE, -4, 4), rtol=1e-6)
    assert (along(rule="still") == 0).all()
    affine = multiplier(along(rule="affine", parameters={"low": 0.5, "high": 1.2}))
    np.testing.assert_allclose(affine, np.clip(1 - 0.25 * DRIVE, 0.5, 1.2), rtol=1e-6)
    kappa = 4 * 0.25 / (1.8 - 0.4)
    sigmoid = multiplier(along(rule="sigmoid", parameters={"low": 0.4, "high": 1.8}))
    np.testing.assert_allclose(sigmoid, 0.4 + 1.4 / (1 + np.exp(kappa * DRIVE)), rtol=1e-6)


@pytest.mark.parametrize("rule", ["exp", "affine", "sigmoid"])
def test_smooth_rules_agree_where_the_load_is_small(rule: str) -> None:
    small = replace(BASE, surprisal_weight=1e-3, entropy_weight=0.0, rule=rule)
    found = loads_along(small, SURPRISAL, ENTROPY)
    np.testing.assert_allclose(found, 1e-3 * (SURPRISAL - 3) / 2, rtol=3e-3, atol=2e-7)


def test_the_slope_is_what_turns_a_multiplier_into_a_load() -> None:
    for slope in (0.1, 0.5):
        found = along(rule="affine", slope=slope, parameters={"low": 0.25})
        np.testing.assert_allclose(np.exp(-slope * found), np.clip(1 - slope * DRIVE, 0.25, 4), rtol=1e-6)


def test_the_gate_opens_where_both_are_above_their_window() -> None:
    found = along(rule="gate", parameters={"window": 10, "history": 6, "percentile": 70})
    assert set(np.unique(found)) == {0.0, np.inf}
    for row in range(len(found)):
        for place in range(60):
            start = max(0, place - 10)
            if place < 6:
                assert found[row, place] == 0
                continue
            high = [series[row, place] > np.percentile(series[row, start:place], 70) for series in (SURPRISAL, ENTROPY)]
            assert np.isinf(found[row, place]) == all(high)


def test_ranks_keep_the_mean_on_any_text() -> None:
    rows = np.random.default_rng(1).lognormal(2.0, 1.0, (3, 4000))  # far from the calibrated mean, and skewed
    signal = replace(BASE, entropy_weight=0.0, rule="rank", parameters={"spread": 0.9}, momentum=0.02)
    late = loads_along(signal, rows, rows)[:, 1000:]
    assert np.abs(late.mean(axis=1)).max() < 0.06
    assert np.abs(np.quantile(late, [0.25, 0.75]) - [-0.45, 0.45]).max() < 0.1
    assert np.abs(late).max() <= 0.9
    # The larger of two signals never has the lower rank.
    tracker = LoadTracker(signal)
    assert np.diff(tracker.step(np.linspace(-10, 40, 9), np.zeros(9))).min() >= 0


def test_the_ladder_is_dense_as_often_as_it_says() -> None:
    rows = np.random.default_rng(1).normal(3.0, 2.0, (3, 4000))
    signal = replace(BASE, surprisal_weight=0.4, entropy_weight=0.0, rule="ladder", parameters={"percentile": 90})
    found = loads_along(signal, rows, rows)
    assert set(np.unique(found)) == {0.0, np.inf}
    assert np.isinf(found).mean() == pytest.approx(0.1, abs=0.02)
    assert rows[np.isinf(found)].min() > np.quantile(rows, 0.75)


def test_a_refresh_needs_a_whole_window_of_high_load() -> None:
    row = np.array([[3.0] * 3 + [9.0] * 10 + [-9.0] * 5])
    signal = replace(BASE, entropy_weight=0.0, rule="refresh", parameters={"level": 1.0, "window": 4})
    found = np.isinf(loads_along(signal, row, row))[0]
    # z is 0 0 0 3 3 3 ...: the mean of four is above 1 with the second 3, and then after four new ones each time.
    assert np.flatnonzero(found).tolist() == [4, 8, 12]


def test_running_standardisation_follows_the_text() -> None:
    rows = np.random.default_rng(1).normal(20.0, 5.0, (2, 3000))
    found = loads_along(replace(BASE, surprisal_weight=1.0, entropy_weight=0.0, momentum=0.02), rows, rows)
    assert found[:, 0] == pytest.approx(np.clip((rows[:, 0] - 3) / 2, -4, 4))
    late = found[:, 1000:]
    assert abs(late.mean()) < 0.1 and late.std() == pytest.approx(1.0, abs=0.1)
    # By hand, one step.
    tracker = LoadTracker(replace(BASE, surprisal_weight=1.0, entropy_weight=0.0, momentum=0.1))
    tracker.step([5.0], [4.0])
    mean, variance = 3 + 0.1 * 2, 0.9 * (4 + 0.1 * 4)
    assert tracker.step([5.0], [4.0])[0] == pytest.approx((5 - mean) / math.sqrt(variance), rel=1e-6)


@pytest.mark.parametrize("rule", CONTROLLERS)
@given(places=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 59)), max_size=5), momentum=st.sampled_from([0.0, 0.1]))
def test_rows_are_apart_and_a_bad_step_leaves_no_trace(rule: str, places: list[tuple[int, int]], momentum: float) -> None:
    signal = replace(BASE, rule=rule, momentum=momentum)
    surprisal = SURPRISAL.copy()
    for row, place in places:
        surprisal[row, place] = np.nan
    found = loads_along(signal, surprisal, ENTROPY)
    assert not np.isnan(found).any() and not np.isneginf(found).any()
    for row in range(4):
        kept = ~np.isnan(surprisal[row])
        assert np.isinf(found[row, ~kept]).all()
        alone = loads_along(signal, surprisal[row, kept][None], ENTROPY[row, kept][None])
        np.testing.assert_allclose(found[row, kept], alone[0], rtol=1e-6)


def test_another_batch_starts_anew() -> None:
    tracker = LoadTracker(replace(BASE, rule="rank", momentum=0.3, parameters={"momentum": 0.5}))
    first = tracker.step(SURPRISAL[:, 0], ENTROPY[:, 0])
    tracker.step(SURPRISAL[:2, 1], ENTROPY[:2, 1])
    np.testing.assert_array_equal(tracker.step(SURPRISAL[:, 0], ENTROPY[:, 0]), first)


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("loud", {}, "unknown rule 'loud'; known: exp, still"),
        ("exp", {"low": 1.0}, "has no parameter 'low'; it has none"),
        ("gate", {"low": 1.0}, "it has window, history, percentile"),
        ("affine", {"low": 0.0}, "0 < low < high"),
        ("sigmoid", {"low": 2.0}, "0 < low < high"),
        ("gate", {"window": 2.5}, "window is 2.5; it must be a whole number"),
        ("gate", {"history": 11}, "the window holds 10"),
        ("gate", {"percentile": 101}, "percentile is 101"),
        ("rank", {"momentum": 2}, "momentum is 2"),
        ("refresh", {"window": 0}, "from 1 to"),
        ("refresh", {"window": 1e9}, "from 1 to"),
    ],
)
def test_rules_that_are_refused(name: str, parameters: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_controller(name, parameters)


def test_plans_with_and_without_a_rule(tmp_path: Path) -> None:
    signal = replace(BASE, rule="gate", parameters={"window": 12.0}, momentum=0.05)
    plan = SparsityPlan("clada", "gate", "threshold", (), signal, {"weights_digest": "00"})
    plan.save(tmp_path / "plan.json")
    assert SparsityPlan.load_file(tmp_path / "plan.json").load == signal
    value = json.loads((tmp_path / "plan.json").read_text())
    older = {**value, "load": {key: value["load"][key] for key in list(value["load"])[:6]}}
    assert SparsityPlan.from_dict(older).load == BASE
    value["load"]["parameters"] = {"width": 3}
    with pytest.raises(UsageError, match="plan: load: rule 'gate' has no parameter 'width'"):
        SparsityPlan.from_dict(value)
    value["load"] = {**value["load"], "parameters": {}, "rule": "loud"}
    with pytest.raises(UsageError, match="loud"):
        SparsityPlan.from_dict(value)
