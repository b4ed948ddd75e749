"""The way to a plan that thresholds make: statistics, allocation, budget search, load response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clada_export.calibration.allocation import Allocation, Layers, allocate
from clada_export.calibration.axis import AXES
from clada_export.calibration.budget import SearchStep, search_sparsity
from clada_export.calibration.calibrate import CalibrationOptions, CalibrationResult, Calibrator
from clada_export.calibration.context import MethodMaker
from clada_export.calibration.drift import Drift
from clada_export.calibration.load_response import LOAD_SLOPE, fit_load_response
from clada_export.calibration.selector import LayerSelector, Selectors
from clada_export.calibration.statistics import CalibrationStatistics, LayerTable, collect_statistics
from clada_export.calibration.weights import Pruning
from clada_export.plan.layer import LayerPlan
from clada_export.plan.method import Method
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.record import ComparedVariant, SearchedSparsity, TriedResponse

COMPARE_AT = 0.45
"""The sparsity at which allocations and variants are compared when a budget is given."""
LOAD_MIN, LOAD_MAX = 0.25, 4.0
"""Bounds of m(load) in the engine: a load of -4..4 does not reach them at the op's slope, only one from outside does."""


@dataclass(frozen=True)
class AllocatedMethod:
    """A method with its layers' shares settled by an allocation, and its drift at the sparsity of comparison."""

    method: Method
    layers: tuple[LayerSelector, ...]
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
    selectors = Selectors(calibrator.decoder.ffns, ready.methods)
    statistics = ready.cache.statistics(selectors, calibrator.prompt, lambda missing: _collected(calibrator, missing))
    candidates = _candidates(calibrator, selectors, statistics.tables, aimed, options, allocation)
    best = _best(candidates)

    sparsity, levels, drift, history = _settle(calibrator, best, aimed, options)
    signal = statistics.load
    tried: tuple[TriedResponse, ...] = ()
    if options.load_response and maker.responds:
        response = fit_load_response(
            calibrator.meter, best.layers, best.allocation, sparsity, signal, drift, levels, calibrator.step
        )
        # A response must not break the budget that was just met.
        if options.keeps(response.drift):
            signal, levels, drift = response.signal, response.levels, response.drift
        tried = response.tried
    record = replace(
        calibrator.record(options, best.method),
        allocation=best.allocation.name,
        compared=tuple(candidate.compared() for candidate in candidates),
        search=search_history(history),
        load_response=tried,
    )
    method = best.method
    layers, arrays = best.settled(levels), dict(method.arrays)
    plan = SparsityPlan(maker.name, method.score, method.rule, layers, signal, source, arrays=arrays)
    return calibrator.result(plan, drift, record, options)


def search_history(steps: Sequence[SearchStep]) -> tuple[SearchedSparsity, ...]:
    """A search as a plan tells it."""
    return tuple(SearchedSparsity(item.sparsity, item.cost, item.drift.mean_kl) for item in steps)


def _collected(calibrator: Calibrator, missing: Selectors) -> CalibrationStatistics:
    return collect_statistics(
        calibrator.decoder,
        missing,
        calibrator.data.calibration,
        calibrator.prompt,
        lambda done, total: calibrator.progress("statistics", done, total),
    )


def _candidates(
    calibrator: Calibrator,
    selectors: Selectors,
    tables: tuple[tuple[LayerTable, ...], ...],
    aimed: float,
    options: CalibrationOptions,
    wanted: str | None,
) -> list[AllocatedMethod]:
    """The plainest method under each of its allocations, then its variants under the best of these."""
    found: list[AllocatedMethod] = []
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
        if options.sparsity is None and options.budget.metric == "cett":
            names = ("cett",)
        for name in names:
            allocation = allocate(name, layers)
            drift = calibrator.meter.measure(selectors.layers[index], allocation.levels_for(aimed), step=calibrator.step)
            found.append(AllocatedMethod(method, selectors.layers[index], allocation, drift))
    return found


def _settle(
    calibrator: Calibrator, best: AllocatedMethod, aimed: float, options: CalibrationOptions
) -> tuple[float, np.ndarray, Drift, Sequence[SearchStep]]:
    """(sparsity, levels, drift, the search) that the user's goal asks for."""
    allocation = best.allocation
    if options.sparsity is not None:
        return aimed, allocation.levels_for(aimed), best.drift, ()
    if options.budget.metric == "cett":
        levels = allocation.levels_at(options.budget.limit)
        drift = calibrator.meter.measure(best.layers, levels, step=calibrator.step)
        return allocation.mean_sparsity(levels), levels, drift, ()

    def measure(wanted: float) -> Drift:
        if wanted == aimed:
            return best.drift
        return calibrator.meter.measure(best.layers, allocation.levels_for(wanted), step=calibrator.step)

    found, steps = search_sparsity(options.budget, measure, first=aimed)
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
