"""`--policy auto`: calibrate every policy, and take the one that reads the fewest bytes among those that keep the budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clada_export.calibration.budget import Budget, BudgetUnmetError
from clada_export.calibration.calibrate import CalibrationOptions, CalibrationResult, Calibrator, Policy
from clada_export.calibration.clock import read_clock
from clada_export.decoder.decoder import Decoder
from clada_export.errors import BackendError, UsageError
from clada_export.plan.goal import Goal
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.record import PolicyChoice, PolicyRow
from clada_export.plan.targets import TARGET_TRAITS

AUTO = "auto"
"""What `--policy` takes to have the policy chosen."""

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

    With a budget, that is the policy that reads the fewest bytes (`cost.relative_bytes`) among those that keep it. With a fixed
    sparsity there is no budget to keep and no price for KL in bytes, so it is the policy with the lowest measured KL among
    those that read fewer bytes than the dense model. The model's weights are left as the chosen plan says.

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
    for name, policy in policies.items():
        reason = _left_out(policy, calibrator, train)
        if reason is not None:
            rows.append(PolicyRow(name, f"{_SKIPPED}{reason}"))
            continue
        calibrator.progress(f"policy {name}", 0, 0)
        start = time.perf_counter()
        try:
            result = calibrator.calibrate(policy, source, options)
        except BudgetUnmetError as error:
            seconds = time.perf_counter() - start
            why = f"does not keep the budget: {_price(error.cost, options.budget)} at {error.sparsity:.0%} already"
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
        cost = cett if options.budget.metric == "cett" else options.budget.cost(result.drift)
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
    reached = [row for row in rows if row.cost is not None]
    if not reached:
        reasons = "; ".join(f"{row.policy}: {row.why.removeprefix(_SKIPPED)}" for row in rows)
        return f"--policy {AUTO}: no policy can be used here ({reasons})"
    nearest = min(reached, key=lambda row: row.cost or 0.0)
    return (
        f"--policy {AUTO}: no policy keeps the budget {options.budget}. The nearest is {nearest.policy}, which costs "
        f"{_price(nearest.cost or 0.0, options.budget)} at {nearest.sparsity or 0.0:.0%} of sparsity on the held-out text. "
        "Give a larger --budget, or more calibration text"
    )


def _price(cost: float, budget: Budget) -> str:
    return f"{cost:.3%} of perplexity" if budget.metric == "ppl" else f"{budget.metric} {cost:.4g}"
