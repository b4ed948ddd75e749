"""What policies share that are one choice of score and rule: nothing is trained, and there are no variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clada_export.decoder.ffn import EagerFFN
from clada_export.methods.base import Dynamic, PolicyContext, PolicySettings, check_gated, check_score
from clada_export.plan.method import Method, draft_layers


@dataclass(frozen=True)
class SinglePolicy(Dynamic):
    """A score under a rule.

    Attributes:
        score, rule: the op's attributes; `stat_norm` too.
        allocations: how layers may share, the published way first.
        gated: whether every FFN needs a gate.
    """

    name: str
    score: str
    rule: str
    allocations: tuple[str, ...]
    stat_norm: str = "row"
    gated: bool = False
    trained: bool = False
    responds: bool = False

    @property
    def scores(self) -> tuple[str, ...]:
        """The one score."""
        return (self.score,)

    def check(self, ffns: Sequence[EagerFFN], settings: PolicySettings) -> None:
        """Any FFN will do, or any with a gate."""
        check_score(self.name, self.scores, settings)
        if self.gated:
            check_gated(self.name, ffns)

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """One method."""
        self.check(context.ffns, context.settings)
        layers = draft_layers(context.ffns, stat_norm=self.stat_norm)
        return (Method(self.name, self.score, self.rule, layers, allocations=self.allocations),)
