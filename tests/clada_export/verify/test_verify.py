"""Verification finds what is wrong: numbers, checks and bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clada_export.runtime import StepOutput, surprisal_entropy
from clada_export.verify.cases import DECODE, make_cases
from clada_export.verify.drift import drift_check
from clada_export.verify.load_outputs import load_output_bound, load_output_check, load_output_error, measure_load_outputs
from clada_export.verify.numbers import common_prefix, compare_logits, log_softmax
from clada_export.verify.parity import tolerance
from clada_export.verify.report import Check, Verification


def test_equal_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
    numbers = compare_logits(logits, logits.copy())
    assert (numbers.max_abs, numbers.kl, numbers.top1, numbers.positions) == (0.0, 0.0, 1.0, 3)
    assert numbers.cosine == pytest.approx(1.0)


def test_nan_is_never_parity() -> None:
    wanted = np.zeros((2, 4), np.float32)
    found = wanted.copy()
    found[1, 2] = np.nan
    assert compare_logits(found, wanted).max_abs == np.inf


def test_no_positions() -> None:
    assert compare_logits(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32)).max_abs == 0.0
    with pytest.raises(ValueError, match="shape"):
        compare_logits(np.zeros((1, 4), np.float32), np.zeros((2, 4), np.float32))


@given(st.integers(0, 2**31 - 1), st.floats(-50, 50))
def test_numbers_of_a_shift(seed: int, shift: float) -> None:
    wanted = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)
    found = (wanted + np.float32(shift)).astype(np.float32)
    numbers = compare_logits(found, wanted)
    assert numbers.max_abs == pytest.approx(abs(shift), abs=1e-5 + abs(shift) * 1e-5)
    # A constant does not change the distribution.
    assert numbers.kl == pytest.approx(0.0, abs=1e-6)
    np.testing.assert_allclose(np.exp(log_softmax(found)).sum(-1), 1.0)


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_common_prefix(first: list[int], second: list[int]) -> None:
    length = common_prefix(first, second)
    assert first[:length] == second[:length]
    assert length == min(len(first), len(second)) or first[length] != second[length]


@pytest.mark.parametrize("limit", [None, 64, 24])
def test_cases_fit_the_model(limit: int | None) -> None:
    text = np.arange(400).reshape(2, 200)
    cases = make_cases(text, 1000, limit)
    assert len(cases) == 4
    for case in cases:
        assert all(len(row) <= (limit or 1000) and len(row) > DECODE for row in case.rows)
    assert len({len(row) for row in cases[1].rows}) == 2
    assert len(make_cases(None, 1000, limit)) == 2


def test_drift_is_held_to_the_budget() -> None:
    numbers = {"ppl_increase": 0.02, "ppl_increase_standard_error": 0.001, "kl": 0.01}
    assert drift_check(numbers, {}).passed
    assert drift_check(numbers, {"ppl_increase": 0.02, "kl": 0.01}).passed
    failed = drift_check(numbers, {"ppl_increase": 0.01})
    assert not failed.passed
    assert "perplexity rises by 2.00%; allowed 1.70%" in failed.why


def test_tolerance_grows_with_the_logits() -> None:
    assert tolerance(20.0) == 3e-4
    assert tolerance(100.0) == pytest.approx(6e-4)


def test_one_failed_check_fails_all() -> None:
    good, bad = Check("a", True, {}, {}), Check("b", False, {}, {}, "too far")
    assert Verification([good]).passed
    result = Verification([good, bad])
    assert not result.passed
    assert result.failures() == ["b: too far"]


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_load_outputs_are_held_to_the_logits(scale: float) -> None:
    logits = (np.random.default_rng(0).normal(size=(2, 50)) * scale).astype(np.float32)
    surprisal, entropy = surprisal_entropy(logits, [3, 4])
    total = surprisal + logits[[0, 1], [3, 4]]
    assert load_output_error(logits, total.astype(np.float32), entropy.astype(np.float32)) < 1e-4
    assert load_output_error(logits, total + 0.5, entropy) == pytest.approx(0.5)
    assert load_output_error(logits, total, entropy * np.nan) == np.inf

    def outputs(wrong: float | None) -> list[StepOutput]:
        """Right of a prompt, wrong of a step."""
        if wrong is None:
            return [StepOutput(logits, None)]
        return [StepOutput(logits, None, total, entropy + error) for error in (0.0, wrong)]

    assert measure_load_outputs(outputs(None)) is None
    measured = [measure_load_outputs(outputs(error)) for error in (0.0, 0.1)]
    good, bad = (load_output_check("a case", found) for found in measured if found is not None)
    assert good.passed
    assert not bad.passed and "nats from what the logits give" in bad.why
    assert load_output_bound(10.0, "bfloat16") > 0.1 > load_output_bound(10.0)
