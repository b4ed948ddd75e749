"""What policies share that are one choice of score and rule: nothing is trained, and there are no variants."""

from __future__ import annotations

from dataclasses import dataclass

from clada_export.calibration.context import PolicyContext
from clada_export.methods.common.policy import MethodPolicy
from clada_export.plan.method import Method, draft_layers


@dataclass(frozen=True, kw_only=True)
class SinglePolicy(MethodPolicy):
    """Its first score under a rule.

    Attributes:
        rule, stat_norm: the op's attributes.
        allocations: how layers may share, the published way first.
    """

    rule: str
    allocations: tuple[str, ...]
    stat_norm: str = "row"

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """One method."""
        self.check(context.ffns)
        layers = draft_layers(context.ffns, stat_norm=self.stat_norm)
        return (Method(self.name, self.scores[0], self.rule, layers, allocations=self.allocations),)
