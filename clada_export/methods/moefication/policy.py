"""MoEfication (arXiv 2110.01786): neurons clustered into experts, a router trained on their activity, the best k experts run.

The experts' outputs are summed unweighted: what runs is exact. See `clada_export.methods.training` for the clustering and the
router.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from clada_export.calibration.context import PolicyContext
from clada_export.methods.common.routed import RoutedPolicy
from clada_export.methods.moefication.train import SETTINGS, train_moefication
from clada_export.methods.training.layer import ExpertLayer
from clada_export.methods.training.train import TrainingReport
from clada_export.plan.method import Method
from graph_passes.router import Router


@dataclass(frozen=True, kw_only=True)
class MoEficationPolicy(RoutedPolicy):
    """Score `external` of experts, rule `topk`."""

    name: str = "moefication"

    def train(self, layer: ExpertLayer, context: PolicyContext, seed: int) -> tuple[Router, TrainingReport]:
        """A router of the experts' activity."""
        return train_moefication(layer, settings=replace(SETTINGS, seed=seed))

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """One method; the same k in every layer as published, or shared out."""
        return (self.method("moefication", "topk", self.train_all(context), ("sparsity", "fisher")),)
