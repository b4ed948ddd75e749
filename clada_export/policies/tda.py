"""TDA, threshold-based dynamic activation (arXiv 2408.11393): the prompt picks the neurons, by a threshold of each layer.

s_j = ||A[:, j]||_2 over the prompt's activations A, R_j = s_j / max_i s_i, and neurons with R_j >= the layer's threshold stay
for the whole generation. The formula is our own reading of the paper's text; its exact normaliser could not be checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clada_export.ffn import EagerFFN
from clada_export.method import Method, draft_layers
from clada_export.policies.base import Dynamic, PolicyContext, PolicySettings, check_score


@dataclass(frozen=True)
class TDAPolicy(Dynamic):
    """Score `prefix` of the plain L2 statistic, rule `relative`."""

    name: str = "tda"
    trained: bool = False
    responds: bool = False
    scores: tuple[str, ...] = ("prefix",)

    def check(self, ffns: Sequence[EagerFFN], settings: PolicySettings) -> None:
        """Any FFN will do."""
        check_score(self.name, self.scores, settings)

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """One method."""
        self.check(context.ffns, context.settings)
        layers = draft_layers(context.ffns, stat_norm="none")
        return (Method("tda", "prefix", "relative", layers, allocations=("cett", "fisher")),)
