"""The way to a plan that thresholds make: statistics, allocation, budget search, load response."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from clada_export.calibration.allocation import Allocation, Layers, allocate
from clada_export.calibration.axis import AXES
from clada_export.calibration.budget import HIGHEST, LOWEST, BudgetUnmetError, SearchStep, search_sparsity
from clada_export.calibration.calibrate import CalibrationOptions, CalibrationResult, Calibrator, OutdoneError
from clada_export.calibration.context import MethodMaker
from clada_export.calibration.cost import method_bytes
from clada_export.calibration.drift import Drift
from clada_export.calibration.load_response import LOAD_SLOPE, fit_load_response, multiplier_of
from clada_export.calibration.selector import MethodSelectors, Selectors
from clada_export.calibration.statistics import LayerTable
from clada_export.calibration.weights import Pruning
from clada_export.load.signal import LoadSignal
from clada_export.plan.goal import Budget
from clada_export.plan.layer import LayerPlan
from clada_export.plan.method import Method
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.record import ComparedVariant, SearchedSparsity, TriedResponse

COMPARE_AT = 0.45
"""The sparsity at which allocations and variants are compared when a budget is given."""
AHEAD = 0.005
"""By so much sparsity a policy has to be ahead of a rival to be searched for more."""
NEARLY, HOPELESS = 1.15, 2.0
"""Shares of the budget. A cost up to the first may be one that a variant keeps; one above the second on a part of the held-out
windows is not kept on all of them."""
AGREEMENT = 0.1
"""By so much of a limit rounded products may be off for their measurements to stand."""
LOAD_MIN, LOAD_MAX = 0.25, 4.0
"""Bounds of m(load) in the engine: a load of -4..4 does not reach them at the op's slope, only one from outside does."""


@dataclass(frozen=True)
class AllocatedMethod:
    """A method with its layers' shares settled by an allocation, and its drift at the sparsity of comparison."""

    method: Method
    layers: MethodSelectors
    allocation: Allocation
    drift: Drift

    def compared(self) -> ComparedVariant:
        """What a plan tells of it."""
        return ComparedVariant(self.method.label, self.allocation.name, self.drift.mean_kl, self.drift.sparsity)

    def settled(self, levels: np.ndarray) -> tuple[LayerPlan, ...]:
        """The layers with the thresholds of these levels [layers]."""
        layers, axis = [], self.allocation.layers.axis
        for layer, table, level in zip(self.method.layers, self.allocation.layers.tables, levels, strict=True):
            threshold = axis.threshold(float(level), layer.width // layer.granule)
            layers.append(
                replace(
                    layer,
                    threshold=(threshold,),
                    load_slope=LOAD_SLOPE,
                    load_min=LOAD_MIN,
                    load_max=LOAD_MAX,
                    expected_sparsity=float(table.sparsity_at(level)),
                    expected_cett=table.cett_at(float(level)),
                )
            )
        return tuple(layers)


def plan_thresholds(
    calibrator: Calibrator,
    maker: MethodMaker,
    source: dict[str, Any],
    options: CalibrationOptions,
    *,
    pruning: Pruning | None,
    allocation: str | None = None,
) -> CalibrationResult:
    """Choose a variant, how layers share the sparsity, the sparsity and the response to the load.

    Args:
        maker: makes the variants.
        source: goes into the plan; holds at least `weights_digest`.
        pruning: how the weights are pruned before.
        allocation: the one way to share, or None for the best of the method's own.

    Raises:
        UsageError: as `MethodMaker.methods`; a budget that no sparsity keeps.
    """
    aimed = options.sparsity if options.sparsity is not None else COMPARE_AT
    ready = calibrator.prepare(maker, options, pruning, aimed)
    statistics = calibrator.statistics(ready)
    selectors = Selectors(calibrator.decoder.ffns, ready.methods)
    if options.rival is not None:
        aimed = equal_sparsity(ready.methods[0], options.rival, options.item)
    responds = options.load_response and maker.responds
    if options.dense is not None and not options.keeps(options.dense):
        return _dense_plan(calibrator, maker, ready.methods[0], source, options, options.dense, statistics.load)
    # What is compared with nothing, and led to nothing, is measured once, as the model is computed.
    once = options.sparsity is not None and not responds and _alone(ready.methods, allocation)
    candidates = _candidates(calibrator, selectors, statistics.tables, aimed, options, allocation, exact=once)
    best = _best(candidates)
    try:
        settled = _settled(calibrator, best, aimed, options, statistics.load, maker.responds)
    except BudgetUnmetError:
        if options.dense is None:
            raise
        return _dense_plan(calibrator, maker, best.method, source, options, options.dense, statistics.load)
    drift = settled.drift
    if calibrator.meter.fast and not once:
        exact = _exact(calibrator, best, settled, options)
        # A few windows that agree stand for the others; else what a plan says of itself is measured as the model is computed.
        drift = exact if len(exact.kl) == len(settled.drift.kl) else settled.drift
        if not options.keeps(drift):
            settled = _settled_again(calibrator, best, settled, drift, options, statistics.load)
            drift = settled.drift
    record = replace(
        calibrator.record(options, best.method),
        allocation=best.allocation.name,
        compared=tuple(candidate.compared() for candidate in candidates),
        search=search_history(settled.history),
        load_response=settled.tried,
    )
    method = best.method
    layers, arrays = best.settled(settled.levels), dict(method.arrays)
    plan = SparsityPlan(maker.name, method.score, method.rule, layers, settled.signal, source, arrays=arrays)
    return calibrator.result(plan, drift, record, options)


def _dense_plan(
    calibrator: Calibrator,
    maker: MethodMaker,
    method: Method,
    source: dict[str, Any],
    options: CalibrationOptions,
    drift: Drift,
    signal: LoadSignal,
) -> CalibrationResult:
    """A plan that skips nothing: thresholds of 0, which no load moves.

    Args:
        drift: of the model that skips nothing.
        signal: without a response.
    """
    if calibrator.meter.fast:
        drift = calibrator.dense_drift(exact=True)
    layers = tuple(replace(layer, threshold=(0.0,), load_min=LOAD_MIN, load_max=LOAD_MAX) for layer in method.layers)
    plan = SparsityPlan(maker.name, method.score, method.rule, layers, signal, source, arrays=dict(method.arrays))
    return calibrator.result(plan, drift, calibrator.record(options, method), options)


@dataclass(frozen=True)
class _Settled:
    """Where the search and the fit of the response ended: the levels [layers] of a mean sparsity, and what led there."""

    sparsity: float
    levels: np.ndarray
    signal: LoadSignal
    drift: Drift
    history: Sequence[SearchStep]
    tried: tuple[TriedResponse, ...]


def _settled(
    calibrator: Calibrator,
    best: AllocatedMethod,
    aimed: float,
    options: CalibrationOptions,
    signal: LoadSignal,
    responds: bool,
    exact: bool = False,
) -> _Settled:
    """Search, then fit the response.

    Args:
        aimed: the sparsity that `best.drift` was measured at.
        signal: without a response.
        exact: measure in float32.
    """
    meter = calibrator.meter

    def measure(
        layers: MethodSelectors,
        levels: np.ndarray,
        multiplier: Tensor | None = None,
        enough: Callable[[Drift], bool] = lambda drift: False,
    ) -> Drift:
        return meter.measure(layers, levels, multiplier, calibrator.step, exact=exact, enough=enough)

    sparsity, levels, drift, history = _settle(measure, best, aimed, options)
    tried: tuple[TriedResponse, ...] = ()
    if options.load_response and responds:
        response = fit_load_response(meter, measure, best.layers, best.allocation, sparsity, signal, drift, levels)
        # A response must not break the budget that was just met.
        if options.keeps(response.drift):
            signal, levels, drift = response.signal, response.levels, response.drift
        tried = response.tried
    return _Settled(sparsity, levels, signal, drift, history, tried)


def _settled_again(
    calibrator: Calibrator,
    best: AllocatedMethod,
    before: _Settled,
    drift: Drift,
    options: CalibrationOptions,
    signal: LoadSignal,
) -> _Settled:
    """Search in float32, from what rounded products took for the end.

    Args:
        drift: of `before`, in float32: it is over the budget.
        signal: without a response. One is fitted again only if there was one.
    """
    if _responds(before.signal):
        known = replace(best, drift=_exact_at(calibrator, best, before.sparsity))
        return _settled(calibrator, known, before.sparsity, options, signal, True, exact=True)
    known = replace(best, drift=drift)
    again = _settled(calibrator, known, before.sparsity, options, signal, False, exact=True)
    return replace(again, history=(*before.history, *again.history), tried=before.tried)


def _responds(signal: LoadSignal) -> bool:
    return signal.surprisal_weight != 0.0 or signal.entropy_weight != 0.0


def _exact(calibrator: Calibrator, best: AllocatedMethod, settled: _Settled, options: CalibrationOptions) -> Drift:
    """The drift of what was settled, in float32: of all windows, or of the first ones if rounded products agree on them."""
    meter, signal = calibrator.meter, settled.signal
    multiplier = multiplier_of(signal, meter.signals, meter.context) if _responds(signal) else None
    bound = options.sparsity is None and options.budget.cett is None
    agree = partial(agrees, fast=settled.drift, budget=options.budget) if bound else lambda drift: True
    return meter.measure(best.layers, settled.levels, multiplier, calibrator.step, exact=True, enough=agree)


def agrees(exact: Drift, fast: Drift, budget: Budget) -> bool:
    """Whether rounded products may speak for float32: on the windows that both have, the mean surprisal and KL differ by at
    most a tenth of their limits, and with that difference the budget is kept on all windows.

    Args:
        exact: of the first windows.
        fast: of all windows.
    """
    same = np.isin(fast.window, np.unique(exact.window))
    nll = float((exact.nll - exact.dense_nll).mean() - (fast.nll[same] - fast.dense_nll[same]).mean())
    kl = float(exact.kl.mean() - fast.kl[same].mean())
    limits = budget.limits
    if nll > AGREEMENT * limits.get("ppl", math.inf) or kl > AGREEMENT * limits.get("kl", math.inf):
        return False
    return budget.keeps(replace(fast, nll=fast.nll + max(nll, 0.0), kl=fast.kl + max(kl, 0.0)))


def _exact_at(calibrator: Calibrator, best: AllocatedMethod, sparsity: float) -> Drift:
    """The drift at a sparsity without a response, in float32."""
    return calibrator.meter.measure(best.layers, best.allocation.levels_for(sparsity), step=calibrator.step, exact=True)


def equal_sparsity(method: Method, rival: float, item: float) -> float:
    """The sparsity at which a method reads a little less than a rival's bytes, relative to dense.

    Args:
        item: bytes of one weight.

    Raises:
        OutdoneError: not even the highest sparsity gets there.
    """
    dense, empty = (method_bytes(method, active, item) for active in (1.0, 0.0))
    wanted = (dense - rival) / (dense - empty) + AHEAD if dense > empty else math.inf
    if wanted > HIGHEST:
        least = dense + (empty - dense) * HIGHEST
        raise OutdoneError(f"reads x{least:.3f} at {HIGHEST:.0%}, not fewer than x{rival:.3f}", None, HIGHEST)
    return max(wanted, LOWEST)


def search_history(steps: Sequence[SearchStep]) -> tuple[SearchedSparsity, ...]:
    """A search as a plan tells it."""
    return tuple(SearchedSparsity(item.sparsity, item.cost, item.drift.mean_kl, item.drift.ppl_increase) for item in steps)


def _candidates(
    calibrator: Calibrator,
    selectors: Selectors,
    tables: tuple[tuple[LayerTable, ...], ...],
    aimed: float,
    options: CalibrationOptions,
    wanted: str | None,
    *,
    exact: bool,
) -> list[AllocatedMethod]:
    """The plainest method under each of its allocations, then its variants under the best of these.

    Args:
        exact: measure in float32.
    """
    found: list[AllocatedMethod] = []

    def hopeless(drift: Drift) -> bool:
        return options.rival is not None and options.budget.cost(drift) > HOPELESS

    for index, method in enumerate(selectors.methods):
        layers = Layers(
            AXES[method.rule],
            tables[index],
            tuple(layer.width for layer in method.layers),
            tuple(calibrator.sensitivity),
        )
        names = method.allocations if wanted is None else (wanted,)
        if index and wanted is None:
            names = (min(found, key=lambda candidate: candidate.drift.mean_kl).allocation.name,)
        # A CETT target is by definition the same in all layers.
        if options.sparsity is None and options.budget.cett is not None:
            names = ("cett",)
        for name in names:
            allocation = allocate(name, layers)
            selected, levels = selectors.layers[index], allocation.levels_for(aimed)
            drift = calibrator.meter.measure(selected, levels, step=calibrator.step, enough=hopeless, exact=exact)
            found.append(AllocatedMethod(method, selected, allocation, drift))
        if options.rival is not None and not any(options.keeps(item.drift) for item in found):
            nearest = min(found, key=lambda item: options.budget.cost(item.drift))
            cost = options.budget.cost(nearest.drift)
            # A variant is a few hundredths better than the plainest method, not more.
            if cost > NEARLY or index == len(selectors.methods) - 1:
                told = options.budget.told(nearest.drift)
                raise OutdoneError(f"reads x{options.rival:.3f} at {aimed:.0%}, where it costs {told}", cost, aimed)
    return [item for item in found if len(item.drift.nll) == max(len(other.drift.nll) for other in found)]


def _alone(methods: Sequence[Method], wanted: str | None) -> bool:
    """Whether there is one candidate."""
    return len(methods) == 1 and (wanted is not None or len(methods[0].allocations) == 1)


def _settle(
    measure: Callable[[MethodSelectors, np.ndarray], Drift],
    best: AllocatedMethod,
    aimed: float,
    options: CalibrationOptions,
) -> tuple[float, np.ndarray, Drift, Sequence[SearchStep]]:
    """(sparsity, levels, drift, the search) that the user's goal asks for.

    Args:
        measure: the drift of layers at levels [layers].
        aimed: the sparsity that `best.drift` was measured at.
    """
    allocation = best.allocation
    if options.sparsity is not None:
        return aimed, allocation.levels_for(aimed), best.drift, ()
    if options.budget.cett is not None:
        levels = allocation.levels_at(options.budget.cett)
        return allocation.mean_sparsity(levels), levels, measure(best.layers, levels), ()
    # Where an FFN gives zeros anyway, many sparsities have the same levels.
    measured = {allocation.levels_for(aimed).tobytes(): best.drift}

    def drift_at(sparsity: float) -> Drift:
        levels = allocation.levels_for(sparsity)
        key = levels.tobytes()
        if key not in measured:
            measured[key] = measure(best.layers, levels)
        return measured[key]

    def predicted(sparsity: float) -> float:
        return allocation.predicted_kl(allocation.levels_for(sparsity))

    found, steps = search_sparsity(options.budget, drift_at, first=aimed, predicted=predicted)
    return found.sparsity, allocation.levels_for(found.sparsity), found.drift, steps


def _best(candidates: Sequence[AllocatedMethod]) -> AllocatedMethod:
    """The candidate with the lowest mean KL; a variant has to beat the plainest method clearly.

    A variant costs state or time of its own, so it is taken only if its mean KL is lower by more than one standard error of the
    paired difference over windows.
    """
    plainest = candidates[0].method
    best = min((item for item in candidates if item.method is plainest), key=lambda item: item.drift.mean_kl)
    for item in candidates:
        if item.method is plainest:
            continue
        gain, error = item.drift.gain_over(best.drift)
        if gain > error:
            best = item
    return best
