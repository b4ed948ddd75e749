"""D2DMoE (arXiv 2310.04361): a router predicts the norm of every expert's output; experts near the largest run (dynamic k).

The sparsity-enforcing fine-tuning of the paper is left out: the model's weights are as they are given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from clada_export.calibration.context import PolicyContext
from clada_export.methods.common.routed import RoutedPolicy
from clada_export.methods.d2dmoe.train import SETTINGS, train_d2dmoe
from clada_export.methods.training.layer import ExpertLayer
from clada_export.methods.training.train import TrainingReport
from clada_export.plan.method import Method
from graph_passes.router import Router


@dataclass(frozen=True, kw_only=True)
class D2DMoEPolicy(RoutedPolicy):
    """Score `external` of experts, rule `relative`."""

    name: str = "d2dmoe"

    def train(self, layer: ExpertLayer, context: PolicyContext, seed: int) -> tuple[Router, TrainingReport]:
        """A router of the experts' output norms."""
        return train_d2dmoe(layer, settings=replace(SETTINGS, seed=seed))

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """One method; one share of the largest for all layers as published, or one a layer."""
        return (self.method("d2dmoe", "relative", self.train_all(context), ("level", "fisher")),)
