"""CATS (arXiv 2404.08763): keep neuron j where |act(W_g x)_j| reaches the layer's threshold.

The threshold is a percentile of the calibration text's gate activations, the same percentile in every layer as published. The
gate is computed for all neurons; rows of up and down are saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clada_export.ffn import EagerFFN
from clada_export.method import Method, draft_layers
from clada_export.policies.base import Dynamic, PolicyContext, PolicySettings, check_gated, check_score


@dataclass(frozen=True)
class CatsPolicy(Dynamic):
    """Score `gate`, rule `threshold`."""

    name: str = "cats"
    trained: bool = False
    responds: bool = False
    scores: tuple[str, ...] = ("gate",)

    def check(self, ffns: Sequence[EagerFFN], settings: PolicySettings) -> None:
        """Every FFN needs a gate."""
        check_score(self.name, self.scores, settings)
        check_gated(self.name, ffns)

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """One method."""
        self.check(context.ffns, context.settings)
        layers = draft_layers(context.ffns)
        return (Method("cats", "gate", "threshold", layers, allocations=("sparsity", "fisher")),)
