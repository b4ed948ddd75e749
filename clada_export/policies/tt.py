"""TT, threshold truncation (arXiv 2405.09274; threshold by CETT, arXiv 2402.03804).

A neuron is dropped where the norm of its output, |h_j| * ||W_d[:, j]||, is below the layer's threshold, evaluated on the true
h. Gate and up are computed for all neurons, so that only rows of the down projection are saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clada_export.ffn import EagerFFN
from clada_export.method import Method, draft_layers
from clada_export.policies.base import Dynamic, PolicyContext, PolicySettings, check_score


@dataclass(frozen=True)
class ThresholdTruncationPolicy(Dynamic):
    """Score `exact`, rule `threshold`."""

    name: str = "tt"
    trained: bool = False
    responds: bool = False
    scores: tuple[str, ...] = ("exact",)

    def check(self, ffns: Sequence[EagerFFN], settings: PolicySettings) -> None:
        """Any FFN will do."""
        check_score(self.name, self.scores, settings)

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """One method."""
        self.check(context.ffns, context.settings)
        layers = draft_layers(context.ffns)
        return (Method("tt", "exact", "threshold", layers, allocations=("cett", "sensitivity")),)
