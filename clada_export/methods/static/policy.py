"""Static pruning as a policy: Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774), the baselines without dynamics.

The sparsity is that of the weights (of the neurons, with `--pattern neurons`); every neuron that is left runs for every token.
`--prune` composes the same with any dynamic policy. See `docs/pruning.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from clada_export.calibration.budget import BudgetUnmetError, search_sparsity
from clada_export.calibration.calibrate import CalibrationOptions, CalibrationResult, Calibrator
from clada_export.calibration.context import PolicyContext
from clada_export.calibration.drift import Drift
from clada_export.calibration.thresholds import COMPARE_AT, plan_thresholds, search_history
from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UsageError
from clada_export.methods.common.policy import MethodPolicy
from clada_export.methods.prune_spec import NEURONS, UNSTRUCTURED, PruneSpec, check_pattern
from clada_export.methods.static.prune import WeightPruning
from clada_export.plan.goal import Goal
from clada_export.plan.method import Method, draft_layers


@dataclass(frozen=True, kw_only=True)
class StaticPolicy(MethodPolicy):
    """Weights are pruned and nothing is skipped: a threshold of zero."""

    scores: tuple[str, ...] = ("gate",)
    prunes: bool = True

    @property
    def pattern(self) -> str:
        """What the user asked for, or single weights."""
        return self.settings.pattern or UNSTRUCTURED

    def check_options(self, pruned: bool) -> None:
        """Refuse pruning twice too, and a pattern that is none."""
        super().check_options(pruned)
        if pruned:
            raise UsageError(f"--policy {self.name} prunes by itself; leave --prune out")
        check_pattern(self.pattern)

    def left_out(self, ffns: Sequence[EagerFFN]) -> str | None:
        """Where the engine would read what the dense model's reads."""
        reason = super().left_out(ffns)
        if reason is None and self.pattern != NEURONS:
            return "zeros are stored like other weights, so it reads what the dense model reads; --pattern neurons would not"
        return reason

    def pruning(self, sparsity: float) -> WeightPruning:
        """How weights are pruned at a sparsity.

        Raises:
            UsageError: the pattern is not known, or has another sparsity.
        """
        if (fixed := self._fixed()) is None:
            return WeightPruning(PruneSpec(self.name, self.pattern, sparsity))
        if abs(fixed.sparsity - sparsity) > 1e-6:
            raise UsageError(
                f"--pattern {self.pattern} is a sparsity of {fixed.sparsity:g}, not {sparsity:g}; give --sparsity so"
            )
        return WeightPruning(fixed)

    def plan(self, calibrator: Calibrator, source: dict[str, Any], options: CalibrationOptions) -> CalibrationResult:
        """Prune; where a budget is given, by as much as it allows."""
        self.check_options(options.prune is not None)
        fixed = self._fixed()
        if options.sparsity is not None:
            return self._at(options.sparsity, calibrator, source, options)
        if fixed is not None:
            return self._of_pattern(fixed, calibrator, source, options)
        if options.budget.cett is not None:
            raise UsageError(f"--policy {self.name} has no CETT budget; give ppl=..., kl=... or --sparsity")
        results: dict[float, CalibrationResult] = {}

        def measure(sparsity: float) -> Drift:
            results[sparsity] = self._at(sparsity, calibrator, source, options)
            return results[sparsity].drift

        found, steps = search_sparsity(options.budget, measure, first=COMPARE_AT)
        calibrator.weights.use(self.pruning(found.sparsity))
        result = results[found.sparsity]
        record = replace(result.plan.calibration, search=search_history(steps), goal=Goal.of(options.budget, None))
        return replace(result, plan=replace(result.plan, calibration=record))

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """One method, in which every neuron runs."""
        layers = draft_layers(context.ffns)
        return (Method(self.name, "gate", "threshold", layers, allocations=("dense",)),)

    def _fixed(self) -> PruneSpec | None:
        """What an n:m pattern says of the sparsity too; None for other patterns."""
        return PruneSpec.parse(f"{self.name}={self.pattern}") if ":" in self.pattern else None

    def _at(
        self, sparsity: float, calibrator: Calibrator, source: dict[str, Any], options: CalibrationOptions
    ) -> CalibrationResult:
        pruning, options = self.pruning(sparsity), replace(options, sparsity=sparsity)
        return plan_thresholds(calibrator, self, source, options, pruning=pruning, allocation=self.settings.allocation)

    def _of_pattern(
        self, fixed: PruneSpec, calibrator: Calibrator, source: dict[str, Any], options: CalibrationOptions
    ) -> CalibrationResult:
        """The one sparsity that the pattern has, held to the budget."""
        result = self._at(fixed.sparsity, calibrator, source, options)
        if not options.keeps(result.drift):
            raise BudgetUnmetError(
                f"--pattern {self.pattern} costs {options.budget.told(result.drift)} on the held-out text, and the "
                f"budget is {options.budget}. Give a larger --budget, or another --pattern",
                options.budget.cost(result.drift),
                fixed.sparsity,
            )
        return result
