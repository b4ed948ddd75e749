"""Plans by thresholds: what is measured for one, and that a response to the load breaks no bound of the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from clada_export.calibration import CalibrationOptions, calibrate, load_calibration_data, thresholds
from clada_export.calibration.allocation import Allocation, Layers
from clada_export.calibration.axis import AXES
from clada_export.calibration.budget import STEPS
from clada_export.calibration.calibrate import CalibrationResult, Calibrator
from clada_export.calibration.drift import Drift, DriftMeter
from clada_export.calibration.load_response import LoadResponse
from clada_export.calibration.selector import Selectors
from clada_export.calibration.statistics import LayerTable
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.methods import POLICIES, PolicySettings, get_policy
from clada_export.plan.goal import Budget
from clada_export.plan.method import Method
from clada_export.plan.plan import SparsityPlan
from tests.tiny_models import tiny_model

BUDGET = Budget(ppl=0.02, kl=0.004)
CONTEXT = 32


def planned(**options: Any) -> CalibrationResult:
    data = load_calibration_data(None, 256, context=CONTEXT)
    policy = get_policy("clada", PolicySettings(score="exact", allocation="fisher", prior=False))
    wanted = CalibrationOptions(budget=BUDGET, **options)
    return calibrate(TorchDecoder(tiny_model("llama", 0)), policy, data, {"weights_digest": "0"}, wanted)


def test_a_search_measures_no_levels_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[bytes] = []
    measure = DriftMeter.measure

    def counted(self: DriftMeter, layers: Any, levels: np.ndarray, *args: Any, exact: bool = False, **rest: Any) -> Drift:
        if not exact:
            measured.append(levels.tobytes())
        return measure(self, layers, levels, *args, exact=exact, **rest)

    monkeypatch.setattr(DriftMeter, "measure", counted)
    result = planned(load_response=False)
    # The variant is compared at the sparsity that the search begins with.
    assert len(set(measured)) == len(measured) <= STEPS
    steps = result.plan.calibration.search
    assert steps is not None and len(steps) >= len(measured) and steps[0].sparsity == thresholds.COMPARE_AT
    assert BUDGET.keeps(result.drift)


def test_sparsities_with_the_same_levels_are_measured_once() -> None:
    """An FFN that gives 0 for nine neurons of ten anyway: what is asked for below that is all the same."""
    grid = np.linspace(0.0, 1.0, 65)
    table = LayerTable(grid, np.maximum(0.9, grid), grid[::4], grid[::4], grid[::4])
    layers = Layers(AXES["threshold"], (table,), (64,), (1.0,))
    allocation = Allocation("level", lambda level: np.full(1, level), 1.0, layers)
    still = Drift(np.zeros(2), np.zeros(2), np.full(2, 0.006), np.ones(2), np.zeros(2), 0.9)
    asked: list[float] = []

    def measure(layers: Any, levels: np.ndarray) -> Drift:
        asked.append(float(levels[0]))
        return replace(still, kl=np.full(2, 0.001 if levels[0] < 0.5 else 0.01))

    best = thresholds.AllocatedMethod(None, None, allocation, replace(still, kl=np.full(2, 0.001)))  # type: ignore[arg-type]
    found = thresholds._settle(measure, best, 0.45, CalibrationOptions(budget=BUDGET))
    assert len(set(asked)) == len(asked)
    assert found[2].kl_bound <= 0.004


@pytest.mark.parametrize(
    ("worse", "taken"),
    [
        (lambda drift: replace(drift, kl=drift.kl + 0.01), False),
        (lambda drift: replace(drift, nll=drift.nll + 0.1), False),
        (lambda drift: drift, True),
    ],
)
def test_a_response_that_breaks_one_bound_is_not_taken(
    worse: Callable[[Drift], Drift], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(meter: Any, measure: Any, layers: Any, allocation: Any, sparsity: Any, base: Any, still: Any, levels: Any) -> Any:
        return LoadResponse(replace(base, surprisal_weight=1e-6), levels, worse(still), ())

    monkeypatch.setattr(thresholds, "fit_load_response", fit)
    assert (planned().plan.load.surprisal_weight != 0.0) == taken


def test_a_search_over_pruning_measures_each_amount_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[bool] = []
    measure = DriftMeter.measure

    def counted(*args: Any, exact: bool = False, **rest: Any) -> Drift:
        measured.append(exact)
        return measure(*args, exact=exact, **rest)

    monkeypatch.setattr(DriftMeter, "measure", counted)
    data = load_calibration_data(None, 256, context=CONTEXT)
    calibrator = Calibrator(TorchDecoder(tiny_model("llama", 0)), data, fast=True)
    result = calibrator.calibrate(get_policy("wanda"), {"weights_digest": "0"}, CalibrationOptions(budget=BUDGET))
    steps = result.plan.calibration.search
    # Nothing is compared with it, so that products in bfloat16 would have been for nothing.
    assert steps is not None and measured == [True] * len(steps) and len(steps) <= STEPS
    assert len({step.sparsity for step in steps}) == len(steps)
    assert BUDGET.keeps(result.drift)


@pytest.mark.parametrize("respond", [False, True])
def test_what_rounded_products_find_is_searched_again_in_float32_if_it_costs_too_much(
    respond: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = DriftMeter.measure, []

    def measure(meter: DriftMeter, *args: Any, exact: bool = False, **given: Any) -> Drift:
        found = real(meter, *args, exact=True, **given)
        asked.append(exact)
        return found if exact else replace(found, kl=found.kl / 3)

    monkeypatch.setattr(DriftMeter, "measure", measure)
    model = TorchDecoder(tiny_model("llama", 0))
    data = load_calibration_data(None, 256, context=32)
    options = CalibrationOptions(budget=Budget.parse("kl=0.01"), load_response=respond)
    result = Calibrator(model, data, fast=True).calibrate(POLICIES["clada"], {"weights_digest": "0"}, options)
    assert options.keeps(result.drift)
    # Both searches are told, and the levels are those of a measurement in float32.
    assert asked.count(True) >= 2 and not asked[0] and asked == sorted(asked)
    exact = Calibrator(TorchDecoder(tiny_model("llama", 0)), data, fast=False)
    layers = Selectors(exact.decoder.ffns, (_method(result.plan),)).layers[0]
    if not respond:
        found = real(exact.meter, layers, np.array([layer.threshold[0] for layer in result.plan.layers]))
        np.testing.assert_allclose(result.drift.kl, found.kl, atol=1e-6)
        sparsities = [step.sparsity for step in result.plan.calibration.search]
        assert max(sparsities) > result.plan.expected_sparsity + 0.02


@pytest.mark.parametrize(
    ("nll", "kl", "said"),
    [
        (0.0, 0.0, True),
        (-0.01, -0.004, True),  # float32 is better than was measured
        (0.001, 0.0, True),
        (0.003, 0.0, False),  # more than a tenth of 2%
        (0.0, 0.006, False),  # more than a tenth of 0.05
        (0.0, 0.004, False),  # little, and with it the budget breaks
    ],
)
def test_the_first_windows_speak_for_the_others_only_if_they_agree(nll: float, kl: float, said: bool) -> None:
    window = np.repeat(np.arange(4), 8)
    fast = Drift(np.full(32, 3.0), np.full(32, 3.0), np.full(32, 0.047), np.ones(32), window, 0.6)
    first = window < 2
    exact = Drift(fast.nll[first] + nll, fast.dense_nll[first], fast.kl[first] + kl, np.ones(16), window[first], 0.6)
    assert thresholds.agrees(exact, fast, Budget.parse("ppl=2%,kl=0.05")) == said


def test_a_few_windows_in_float32_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    real, ended = DriftMeter.measure, []

    def measure(meter: DriftMeter, *args: Any, exact: bool = False, enough: Any = None, **given: Any) -> Drift:
        found = real(meter, *args, exact=exact, **given)
        if not exact:
            return found
        part = found.window < 1
        few = Drift(
            found.nll[part], found.dense_nll[part], found.kl[part], found.top1[part], found.window[part], found.sparsity
        )
        ended.append(enough(few))
        return few if ended[-1] else found

    monkeypatch.setattr(DriftMeter, "measure", measure)
    data = load_calibration_data(None, 256, context=32)
    options = CalibrationOptions(budget=BUDGET, load_response=False)
    model = TorchDecoder(tiny_model("llama", 0))
    result = Calibrator(model, data, fast=True).calibrate(POLICIES["clada"], {"weights_digest": "0"}, options)
    assert len(ended) == 1 and len(result.drift.kl) == 4 * (32 - 8 - 1) and BUDGET.keeps(result.drift)


def _method(plan: SparsityPlan) -> Method:
    return Method(plan.policy, plan.score, plan.rule, plan.layers, dict(plan.arrays))
