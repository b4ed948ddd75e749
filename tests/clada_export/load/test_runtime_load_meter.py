"""The load meter against a plain float64 reference, and its invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clada_export.load.meter import LOAD_LIMIT, LoadMeter, surprisal_entropy
from clada_export.load.signal import LoadSignal

ROWS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9), elements=st.floats(-80, 80, width=32)
)


def reference(row: np.ndarray, token: int) -> tuple[float, float]:
    """Surprisal and entropy, with exact summation."""
    values = [float(value) for value in row]
    top = max(values)
    total = math.fsum(math.exp(value - top) for value in values)
    log_total = top + math.log(total)
    entropy = math.fsum(math.exp(value - log_total) * (log_total - value) for value in values)
    return log_total - values[token], entropy


@given(ROWS, st.data())
def test_agrees_with_float64_reference(logits: np.ndarray, data: st.DataObject) -> None:
    tokens = [data.draw(st.integers(0, logits.shape[1] - 1)) for _ in logits]
    surprisal, entropy = surprisal_entropy(logits, tokens)
    for row, token in enumerate(tokens):
        wanted = reference(logits[row], token)
        assert surprisal[row] == pytest.approx(wanted[0], rel=1e-12, abs=1e-12)
        assert entropy[row] == pytest.approx(wanted[1], rel=1e-12, abs=1e-12)
        assert -1e-12 <= entropy[row] <= math.log(logits.shape[1]) + 1e-12


@given(ROWS, st.integers(-1000, 1000))
def test_a_shift_of_all_logits_changes_nothing(logits: np.ndarray, shift: int) -> None:
    tokens = logits.argmin(axis=1)
    wide = logits.astype(np.float64)
    before, after = surprisal_entropy(wide, tokens), surprisal_entropy(wide + shift, tokens)
    np.testing.assert_allclose(after[0], before[0], atol=1e-9)
    np.testing.assert_allclose(after[1], before[1], atol=1e-9)


@given(ROWS)
def test_a_row_does_not_depend_on_the_others(logits: np.ndarray) -> None:
    tokens = logits.argmax(axis=1)
    meter = LoadMeter(LoadSignal(1.0, 0.5, 2.0, 1.5, 0.7, 0.3))
    alone = [meter.update(logits[row : row + 1], tokens[row : row + 1])[0] for row in range(len(logits))]
    np.testing.assert_allclose(meter.update(logits, tokens), alone, rtol=1e-6, atol=1e-6)


def test_formula_and_limits() -> None:
    signal = LoadSignal(
        surprisal_mean=1.0, surprisal_std=2.0, entropy_mean=0.5, entropy_std=4.0, surprisal_weight=0.75, entropy_weight=0.25
    )
    logits = np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
    load = LoadMeter(signal).update(logits, [1])
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert load.dtype == np.float32
    assert load[0] == pytest.approx(0.75 * (math.log(4) - 1) / 2 + 0.25 * (entropy - 0.5) / 4, abs=1e-6)
    peaked = np.array([[100.0, 0.0]], np.float32)
    assert LoadMeter(LoadSignal()).update(peaked, [1])[0] == LOAD_LIMIT
    assert LoadMeter(LoadSignal(surprisal_mean=50.0)).update(peaked, [0])[0] == -LOAD_LIMIT


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_with_a_logit_that_is_not_finite_runs_dense(bad: float) -> None:
    logits = np.array([[0.0, bad, 1.0], [0.0, 1.0, 2.0]], np.float32)
    load = LoadMeter(LoadSignal()).update(logits, [0, 0])
    assert load[0] == np.inf
    assert np.isfinite(load[1])


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="the shapes are"):
        surprisal_entropy(np.zeros((2, 3), np.float32), [0])


@given(ROWS, st.data())
def test_what_the_graph_gives_takes_the_place_of_the_logits(logits: np.ndarray, data: st.DataObject) -> None:
    tokens = np.array([data.draw(st.integers(0, logits.shape[1] - 1)) for _ in logits])
    surprisal, entropy = surprisal_entropy(logits, tokens)
    log_sum_exp = (surprisal + logits[np.arange(len(tokens)), tokens]).astype(np.float32)
    # Only the tokens' own logits are read.
    blind = np.full_like(logits, np.nan)
    blind[np.arange(len(tokens)), tokens] = logits[np.arange(len(tokens)), tokens]
    found = surprisal_entropy(blind, tokens, log_sum_exp, entropy.astype(np.float32))
    np.testing.assert_allclose(found[0], surprisal, rtol=1e-5, atol=3e-5)
    np.testing.assert_allclose(found[1], entropy, rtol=1e-6, atol=1e-6)


def test_a_graph_that_gives_nan_makes_the_row_dense() -> None:
    logits = np.zeros((2, 4), np.float32)
    given_by_graph = {"log_sum_exp": np.array([1.4, 1.4], np.float32), "entropy": np.array([np.nan, 1.4], np.float32)}
    load = LoadMeter(LoadSignal()).update(logits, [0, 0], **given_by_graph)
    assert load[0] == np.inf and np.isfinite(load[1])
    with pytest.raises(ValueError, match=r"\[B\] are wanted"):
        LoadMeter(LoadSignal()).update(logits, [0, 0], log_sum_exp=np.zeros(3), entropy=np.zeros(2))


def test_the_names_are_those_of_the_graph() -> None:
    from clada_export.runtime import graph
    from graph_passes import load_outputs

    assert graph.LOAD_OUTPUTS == load_outputs.LOAD_OUTPUTS
