"""LTE, learn to be efficient (arXiv 2402.06126): experts with independent sigmoid routers, those above one threshold run.

The router is trained with the efficiency and separability losses, the model frozen; its efficiency weight is found so that the
threshold 0.5 gives the wanted sparsity. With a budget the threshold moves, the same in all layers (our own derivation).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from clada_export.experts.layer import ExpertLayer
from clada_export.experts.lte import SETTINGS, lte_for_sparsity
from clada_export.experts.train import TrainingReport
from clada_export.method import Method
from clada_export.policies.base import PolicyContext
from clada_export.policies.routed import RoutedPolicy
from graph_passes.router import Router


@dataclass(frozen=True)
class LTEPolicy(RoutedPolicy):
    """Score `external` of experts, rule `threshold`."""

    name: str = "lte"

    def train(self, layer: ExpertLayer, context: PolicyContext, seed: int) -> tuple[Router, TrainingReport]:
        """A router that opens the share of experts which the sparsity leaves."""
        return lte_for_sparsity(layer, context.sparsity, settings=replace(SETTINGS, seed=seed))

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """One method."""
        return (self.method("lte", "threshold", self.train_all(context), ("level",)),)
