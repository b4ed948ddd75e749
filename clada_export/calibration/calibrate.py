"""Choose thresholds: statistics, allocation, budget search, load response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from clada_export.calibration.allocation import Allocation, by_sensitivity, uniform_cett
from clada_export.calibration.budget import Budget, search_sparsity
from clada_export.calibration.drift import Drift, DriftMeter
from clada_export.calibration.load_response import LOAD_SLOPE, fit_load_response
from clada_export.calibration.scorer import make_scorer
from clada_export.calibration.sensitivity import layer_sensitivity
from clada_export.calibration.statistics import CalibrationStatistics, collect_statistics
from clada_export.calibration.text import CalibrationData
from clada_export.ffn import EagerFFN
from clada_export.plan import LayerPlan, LoadSignal, SparsityPlan
from clada_export.policies import Policy

SENSITIVITY_TOKENS = 1024
SENSITIVITY_LENGTH = 256
COMPARE_AT = 0.45
"""The sparsity at which allocations are compared when a budget is given."""
LOAD_MIN, LOAD_MAX = 0.25, 4.0
"""Bounds of m(load) in the engine: a load of -4..4 does not reach them at the op's slope, only one from outside does."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CalibrationOptions:
    """What the user asked for: a budget, or a fixed mean sparsity."""

    budget: Budget = field(default_factory=lambda: Budget("ppl", 0.02))
    sparsity: float | None = None
    score: str | None = None
    load_response: bool = True
    seed: int = 0


@dataclass(frozen=True)
class CalibrationResult:
    """The plan, and what was measured on the way to it."""

    plan: SparsityPlan
    drift: Drift
    details: dict[str, Any]


def calibrate(
    model: nn.Module,
    ffns: Sequence[EagerFFN],
    policy: Policy,
    data: CalibrationData,
    source: dict[str, Any],
    options: CalibrationOptions,
    progress: Progress = lambda what, done, total: None,
) -> CalibrationResult:
    """Make a sparsity plan for a model.

    The statistics and the gradient pass read `data.calibration`; every decision (allocation, sparsity, load response) is
    measured on `data.heldout`.

    Args:
        source: goes into the plan; holds at least `weights_digest`.
        progress: called with (what, done, total).

    Raises:
        UsageError: a score that the FFNs can't carry, activations that are not finite, a budget that nothing meets.
    """
    score = policy.score_for(ffns, options.score)
    scorers = [make_scorer(ffn, score) for ffn in ffns]
    statistics = collect_statistics(
        model, ffns, scorers, data.calibration, lambda done, total: progress("statistics", done, total)
    )
    sensitivity = layer_sensitivity(
        model,
        ffns,
        _short_windows(data),
        seed=options.seed,
        progress=lambda done, total: progress("sensitivity", done, total),
    )
    meter = DriftMeter(model, ffns, scorers, data.heldout)
    measured = 0

    def step() -> None:
        nonlocal measured
        measured += 1
        progress("held-out windows", measured, 0)

    first = options.sparsity if options.sparsity is not None else COMPARE_AT
    choices: list[tuple[Allocation, Drift]] = []
    for allocation in (uniform_cett(ffns, statistics.tables), by_sensitivity(ffns, statistics.tables, sensitivity)):
        choices.append((allocation, meter.measure(allocation.thresholds_for(first), step=step)))
    allocation, drift = min(choices, key=lambda choice: choice[1].mean_kl)

    history: list[dict[str, float]] = []
    sparsity = first
    if options.sparsity is None:
        known = {first: drift}

        def measure(wanted: float) -> Drift:
            return known.get(wanted) or meter.measure(allocation.thresholds_for(wanted), step=step)

        found, steps = search_sparsity(options.budget, measure, first=first)
        sparsity, drift = found.sparsity, found.drift
        history = [{"sparsity": item.sparsity, "cost": item.cost, "kl": item.drift.mean_kl} for item in steps]

    thresholds = allocation.thresholds_for(sparsity)
    signal = statistics.load
    tried: tuple[dict[str, float | str | bool], ...] = ()
    if options.load_response:
        context = int(data.heldout.shape[1])
        response = fit_load_response(meter, allocation, sparsity, statistics.load, drift, thresholds, context, step)
        # A response must not break the budget that was just met.
        if options.sparsity is not None or options.budget.cost(response.drift) <= options.budget.limit:
            signal, thresholds, drift = response.signal, response.thresholds, response.drift
        tried = response.tried

    details = {
        "text": data.origin,
        "digest": data.digest,
        "calibration_tokens": int(data.calibration.numel()),
        "heldout_tokens": int(data.heldout.numel()),
        "budget": str(options.budget) if options.sparsity is None else f"sparsity={options.sparsity:.4g}",
        "allocation": allocation.name,
        "allocations": {item.name: {"kl": measure_.mean_kl, "sparsity": measure_.sparsity} for item, measure_ in choices},
        "search": history,
        "load_response": list(tried),
        "drift": drift.summary(),
    }
    plan = _plan(ffns, policy, score, statistics, thresholds, signal, source, details)
    return CalibrationResult(plan, drift, {**details, "sensitivity": list(sensitivity)})


def _short_windows(data: CalibrationData) -> Any:
    length = min(SENSITIVITY_LENGTH, data.calibration.shape[1])
    return data.calibration[:, :length][: max(1, SENSITIVITY_TOKENS // length)]


def _plan(
    ffns: Sequence[EagerFFN],
    policy: Policy,
    score: str,
    statistics: CalibrationStatistics,
    thresholds: np.ndarray,
    signal: LoadSignal,
    source: dict[str, Any],
    details: dict[str, Any],
) -> SparsityPlan:
    layers = []
    for ffn, table, threshold in zip(ffns, statistics.tables, thresholds, strict=True):
        # The op compares in float32: plan what it will hold.
        level = float(np.float32(threshold))
        layers.append(
            LayerPlan(
                name=ffn.name,
                activation=ffn.activation,
                gated=ffn.gated,
                hidden_size=ffn.hidden_size,
                intermediate_size=ffn.intermediate_size,
                threshold=(level,),
                load_slope=LOAD_SLOPE,
                load_min=LOAD_MIN,
                load_max=LOAD_MAX,
                expected_sparsity=float(table.sparsity_at(level)),
                expected_cett=table.cett_at(level),
            )
        )
    return SparsityPlan(policy.name, score, policy.rule, tuple(layers), signal, source, details)
