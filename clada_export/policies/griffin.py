"""Griffin (arXiv 2404.01365): the prompt picks the neurons, and they stay for the whole generation.

s_j = sqrt(sum over prompt tokens of h_j^2 / ||h||^2), the neurons with the k largest s are kept; the same k in every layer as
published. With another allocation than `sparsity`, k differs by layer (our own extension).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clada_export.ffn import EagerFFN
from clada_export.method import Method, draft_layers
from clada_export.policies.base import Dynamic, PolicyContext, PolicySettings, check_score


@dataclass(frozen=True)
class GriffinPolicy(Dynamic):
    """Score `prefix`, rule `topk`."""

    name: str = "griffin"
    trained: bool = False
    responds: bool = False
    scores: tuple[str, ...] = ("prefix",)

    def check(self, ffns: Sequence[EagerFFN], settings: PolicySettings) -> None:
        """Any FFN will do."""
        check_score(self.name, self.scores, settings)

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """One method."""
        self.check(context.ffns, context.settings)
        layers = draft_layers(context.ffns)
        return (Method("griffin", "prefix", "topk", layers, allocations=("sparsity", "fisher")),)
