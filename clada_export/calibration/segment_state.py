"""The way to a plan whose layers keep segment state: an FFN that is made of the FFN's experts for each segment.

Such layers have `merge` experts (`clada_export.plan.layer.LayerPlan`). There is no threshold to choose, and not h but the FFN's
output changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clada_export.calibration.budget import BudgetUnmetError
from clada_export.calibration.calibrate import CalibrationOptions, CalibrationResult, Calibrator
from clada_export.calibration.context import MethodMaker
from clada_export.calibration.drift import Drift, Meter
from clada_export.calibration.statistics import HIGHEST_CETT
from clada_export.decoder.ffn import EagerFFN
from clada_export.decoder.tap import FFNTap
from clada_export.load.signal import LoadSignal
from clada_export.op.merge import MergingFFN
from clada_export.op.scorer import layer_attributes, layer_tensors
from clada_export.plan.method import Method
from clada_export.plan.plan import SparsityPlan

FIRST_SPARSITY = 0.5
"""Where a budget is given: two experts become one. More of them cost more, so there is nothing to search."""


@dataclass(frozen=True)
class MergedDrift:
    """The drift, and for each FFN the mean relative error of its output, ||merged FFN(x) - FFN(x)|| / ||FFN(x)||, on the inputs
    of the merged model."""

    drift: Drift
    error: np.ndarray


def plan_segment_state(
    calibrator: Calibrator, maker: MethodMaker, source: dict[str, Any], options: CalibrationOptions
) -> CalibrationResult:
    """Measure the one method that a policy makes, and hold it to the budget.

    Args:
        maker: makes one method, whose layers all have `merge`.
        source: goes into the plan; holds at least `weights_digest`.

    Raises:
        BudgetUnmetError: the fewest experts do not keep the budget; says what they cost.
        UsageError: as `MethodMaker.methods`.
    """
    ready = calibrator.prepare(maker, options, options.prune, FIRST_SPARSITY if options.sparsity is None else options.sparsity)
    (method,) = ready.methods
    found = measure_segment_state(calibrator.meter, calibrator.decoder.ffns, method, calibrator.step)
    layers = tuple(
        replace(layer, expected_sparsity=1.0 - 1.0 / (layer.merge or 1), expected_cett=float(error))
        for layer, error in zip(method.layers, found.error, strict=True)
    )
    skipped = sum(layer.width * layer.expected_sparsity for layer in layers)
    drift = replace(found.drift, sparsity=skipped / sum(layer.width for layer in layers))
    if options.sparsity is None:
        budget, error = options.budget, float(found.error.max())
        kept = budget.keeps(drift) if budget.cett is None else error <= budget.cett
        cost = budget.cost(drift) if budget.cett is None else error / budget.cett
        told = budget.told(drift) if budget.cett is None else f"cett={error:.4g}"
        if not kept:
            raise BudgetUnmetError(
                f"no sparsity keeps the budget {budget}: merging {method.layers[0].merge} experts, the least that "
                f"policy {maker.name!r} can do, already costs {told}. Give a larger --budget, or another --policy",
                cost,
                drift.sparsity,
            )
    signal, arrays = _still_signal(calibrator.meter.signals), dict(method.arrays)
    plan = SparsityPlan(maker.name, method.score, method.rule, layers, signal, source, arrays=arrays)
    return calibrator.result(plan, drift, replace(calibrator.record(options, method), allocation="sparsity"), options)


def measure_segment_state(
    meter: Meter, ffns: Sequence[EagerFFN], method: Method, step: Callable[[], None] = lambda: None
) -> MergedDrift:
    """Run held-out windows as an engine does: the prompt dense, and as the segment that every FFN is merged for.

    Args:
        method: its layers are those of `ffns`, all with `merge`.
        step: called after every window.
    """
    merging = []
    for ffn, layer in zip(ffns, method.layers, strict=True):
        arrays = method.arrays[layer.name]
        assert arrays.router is not None
        tensors = layer_tensors(ffn, method.score, torch.zeros(1), neurons=arrays.neurons)
        merging.append(MergingFFN(tensors, layer_attributes(ffn, method.score, method.rule), arrays.router))
    error = np.zeros((2, len(merging)))
    seen: dict[int, Tensor] = {}

    def inner(index: int, x: Tensor, h: Tensor) -> None:
        seen[index] = x.reshape(-1, x.shape[-1])

    def outer(index: int, y: Tensor) -> Tensor:
        x, rows = seen.pop(index), y.reshape(-1, y.shape[-1]).clone()
        dense = rows[meter.prompt :].float()
        found = merging[index].run(x[meter.prompt :], merging[index].merge(x[: meter.prompt]))
        norm = dense.double().norm(dim=-1)
        usable = norm > 0
        relative = (found - dense).double().norm(dim=-1)[usable] / norm[usable]
        error[0, index] += float(relative.nan_to_num(nan=HIGHEST_CETT).clamp(max=HIGHEST_CETT).sum())
        error[1, index] += int(usable.sum())
        rows[meter.prompt :] = found.to(rows.dtype)
        return rows.reshape(y.shape)

    drift = meter.through(lambda window: FFNTap(ffns, inner=inner, outer=outer), step)
    return MergedDrift(drift, error[0] / np.maximum(error[1], 1))


def _still_signal(signals: Tensor) -> LoadSignal:
    """Mean and deviation of surprisal and entropy, float32 [N, 2, T]; nothing responds to them, so their weights are 0."""
    surprisal, entropy = signals.double().unbind(1)

    def deviation(values: Tensor) -> float:
        return max(float(values.std(correction=0)), 1e-6)

    return LoadSignal(float(surprisal.mean()), deviation(surprisal), float(entropy.mean()), deviation(entropy), 0.0, 0.0)
