"""`--policy auto`: calibrate every policy, and take the one that reads the fewest bytes among those that keep the budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clada_export.calibration.budget import BudgetUnmetError
from clada_export.calibration.calibrate import (
    SEARCH_PASSES,
    CalibrationOptions,
    CalibrationResult,
    Calibrator,
    OutdoneError,
    Policy,
)
from clada_export.calibration.clock import read_clock
from clada_export.calibration.thresholds import COMPARE_AT
from clada_export.decoder.decoder import Decoder
from clada_export.errors import BackendError, UsageError
from clada_export.plan.goal import Goal
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.record import PolicyChoice, PolicyRow
from clada_export.plan.targets import TARGET_TRAITS

AUTO = "auto"
"""What `--policy` takes to have the policy chosen."""

RIVAL_PASSES = 2
"""How often the held-out windows are measured for a policy that is not to be chosen, about."""
_SKIPPED = "skipped: "
Clock = Callable[[SparsityPlan], dict[str, Any]]


def choose(
    calibrator: Calibrator,
    source: dict[str, Any],
    options: CalibrationOptions,
    *,
    policies: Mapping[str, Policy],
    train: bool = False,
    clock: Clock | None = None,
) -> CalibrationResult:
    """Calibrate all policies with one calibrator and keep one.

    With a budget, that is the policy that reads the fewest bytes (`cost.relative_bytes`) among those that keep it. Once one is
    found, a policy is first measured at the sparsity where it would read as many: if that is over the budget, so is all that
    reads fewer, and nothing more is measured of it. With a fixed sparsity there is no budget to keep and no price for KL in
    bytes, so it is the policy with the lowest measured KL among those that read fewer bytes than the dense model. The model's
    weights are left as the chosen plan says.

    Args:
        policies: those to choose among, by name.
        train: whether policies that train routers take part.
        clock: times the chosen plan; what it returns is kept beside the table.

    Returns:
        The chosen policy's result. Its plan's `calibration.auto` is the choice.

    Raises:
        UsageError: no policy keeps the budget (names the nearest, and its cost), or none can be used at all (says why).
    """
    rows: list[PolicyRow] = []
    best: tuple[PolicyRow, CalibrationResult] | None = None
    reasons = {name: _left_out(policy, calibrator, train) for name, policy in policies.items()}
    able = [policy for name, policy in policies.items() if reasons[name] is None]
    calibrator.foresee(able, options, COMPARE_AT if options.sparsity is None else options.sparsity)
    waiting = len(able)
    for name, policy in policies.items():
        reason = reasons[name]
        if reason is not None:
            rows.append(PolicyRow(name, f"{_SKIPPED}{reason}"))
            continue
        waiting -= 1
        calibrator.expect(f"policy {name}", (SEARCH_PASSES if best is None else RIVAL_PASSES) + RIVAL_PASSES * waiting)
        start = time.perf_counter()
        try:
            result = calibrator.calibrate(policy, source, _against(best, options))
        except OutdoneError as error:
            seconds = time.perf_counter() - start
            rows.append(PolicyRow(name, str(error), sparsity=error.sparsity, cost=error.cost, seconds=seconds))
            continue
        except BudgetUnmetError as error:
            seconds = time.perf_counter() - start
            why = f"does not keep the budget: {error.cost:.3g} times what it allows at {error.sparsity:.0%} already"
            rows.append(PolicyRow(name, why, sparsity=error.sparsity, cost=error.cost, seconds=seconds))
            continue
        except UsageError as error:
            rows.append(PolicyRow(name, f"{_SKIPPED}{error}", seconds=time.perf_counter() - start))
            continue
        row = _measured(name, result, options, time.perf_counter() - start)
        rows.append(row)
        if best is None or _rank(row, options) < _rank(best[0], options):
            best = row, result
    if best is None:
        raise UsageError(_nothing(rows, options))
    chosen, result = best
    calibrator.weights.follow(result.pruning, result.plan.arrays)
    explained = tuple(_explained(row, chosen, options) for row in rows)
    timed: Mapping[str, Any] | None = None
    if clock is not None:
        calibrator.progress("clock", 0, 0)
        timed = clock(result.plan)
    goal = str(Goal.of(options.budget, options.sparsity))
    text = _sentence(chosen, sum(not row.why.startswith(_SKIPPED) for row in explained), goal, timed or {})
    auto = PolicyChoice(goal, _rule(options), chosen.policy, explained, timed, text)
    return replace(result, plan=replace(result.plan, calibration=replace(result.plan.calibration, auto=auto)))


def _against(best: tuple[PolicyRow, CalibrationResult] | None, options: CalibrationOptions) -> CalibrationOptions:
    """The options for the next policy: it has to read fewer bytes than the best so far."""
    if best is None or options.sparsity is not None or options.budget.cett is not None:
        return options
    return replace(options, rival=best[0].relative_bytes)


def _sentence(chosen: PolicyRow, measured: int, goal: str, clock: Mapping[str, Any]) -> str:
    """One sentence about a choice."""
    assert chosen.relative_bytes is not None and chosen.kl is not None
    text = f"{chosen.policy} of {measured} policies for {goal}: x{chosen.relative_bytes:.2f} bytes, KL {chosen.kl:.4f}"
    if chosen.relative_bytes >= 1.0:
        text += " (no policy reads fewer bytes than the dense model)"
    return f"{text}; {clock['text']}" if "text" in clock else text


def plan_clock(decoder: Decoder, heldout: Tensor, prompt: int, *, target: str, dtype: str) -> Clock:
    """A clock for `choose`: times layers in ONNX Runtime, or says under `left_out` why it does not."""

    def read(plan: SparsityPlan) -> dict[str, Any]:
        if not TARGET_TRAITS[target].timed:
            found = "this machine has a GPU" if torch.cuda.is_available() else "this machine has no GPU"
            return {
                "left_out": f"target {target}: layers are timed in ONNX Runtime on the CPU only ({found}); "
                "`clada bench` times the engine where it runs"
            }
        try:
            return read_clock(plan, decoder, heldout[0], prompt, dtype=dtype).to_dict()
        except BackendError as error:
            return {"left_out": str(error)}

    return read


def _left_out(policy: Policy, calibrator: Calibrator, train: bool) -> str | None:
    """Why a policy is not measured, if it is not."""
    if policy.trained and not train:
        return "it trains routers; --train lets it take part"
    return policy.left_out(calibrator.decoder.ffns)


def _measured(name: str, result: CalibrationResult, options: CalibrationOptions, seconds: float) -> PolicyRow:
    calibration = result.plan.calibration
    cost = None
    if options.sparsity is None:
        cett = max(layer.expected_cett for layer in result.plan.layers)
        cost = options.budget.cost(result.drift) if options.budget.cett is None else cett / options.budget.cett
    return PolicyRow(
        name,
        "",
        calibration.variant,
        calibration.allocation,
        result.plan.expected_sparsity,
        result.drift.mean_kl,
        result.drift.ppl_increase,
        cost,
        calibration.relative_bytes,
        seconds,
    )


def _rank(row: PolicyRow, options: CalibrationOptions) -> tuple[bool, float]:
    assert row.relative_bytes is not None and row.kl is not None
    if options.sparsity is None:
        return False, row.relative_bytes
    return row.relative_bytes >= 1.0, row.kl


def _rule(options: CalibrationOptions) -> str:
    if options.sparsity is None:
        return f"the fewest bytes read per token among those that keep {options.budget}"
    return (
        "the lowest measured KL among those that read fewer bytes than the dense model; a sparsity sets no budget, and KL has "
        "no price in bytes to weigh the two by"
    )


def _explained(row: PolicyRow, chosen: PolicyRow, options: CalibrationOptions) -> PolicyRow:
    if row is chosen:
        return replace(row, chosen=True, why="chosen")
    if row.why:
        return row
    assert row.relative_bytes is not None and chosen.relative_bytes is not None and row.kl is not None and chosen.kl is not None
    if options.sparsity is None:
        return replace(row, why=f"reads x{row.relative_bytes:.3f}, not fewer than x{chosen.relative_bytes:.3f}")
    if row.relative_bytes >= 1.0 > chosen.relative_bytes:
        return replace(row, why=f"reads x{row.relative_bytes:.3f}, no fewer bytes than the dense model")
    return replace(row, why=f"KL {row.kl:.4f}, not below {chosen.kl:.4f}")


def _nothing(rows: list[PolicyRow], options: CalibrationOptions) -> str:
    # Nothing keeps the budget, so that nothing was outdone.
    reached = [row for row in rows if row.cost is not None]
    if not reached:
        reasons = "; ".join(f"{row.policy}: {row.why.removeprefix(_SKIPPED)}" for row in rows)
        return f"--policy {AUTO}: no policy can be used here ({reasons})"
    nearest = min(reached, key=lambda row: row.cost or 0.0)
    return (
        f"--policy {AUTO}: no policy keeps the budget {options.budget}. The nearest is {nearest.policy}, which costs "
        f"{nearest.cost or 0.0:.3g} times what it allows at {nearest.sparsity or 0.0:.0%} of sparsity on the held-out text. "
        "Give a larger --budget, or more calibration text"
    )
