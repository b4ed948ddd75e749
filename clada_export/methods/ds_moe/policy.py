"""DS-MoE, dense training and sparse inference (arXiv 2404.05567): a router trained with all experts, used with the best k.

The paper trains the whole model so from scratch; here the experts are clusters of a dense model's neurons and only the router
is trained, with its mutual-information loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from clada_export.calibration.context import PolicyContext
from clada_export.methods.common.routed import RoutedPolicy, experts_kept
from clada_export.methods.ds_moe.train import SETTINGS, train_ds_moe
from clada_export.methods.training.layer import ExpertLayer
from clada_export.methods.training.train import TrainingReport
from clada_export.plan.method import Method
from clada_export.source.mixtures.ds_moe import LAYOUT
from graph_passes.router import Router


@dataclass(frozen=True, kw_only=True)
class DSMoEPolicy(RoutedPolicy):
    """Score `external` of experts, rule `topk`, combine `weighted`."""

    name: str = "ds-moe"
    imports: str | None = LAYOUT

    def train(self, layer: ExpertLayer, context: PolicyContext, seed: int) -> tuple[Router, TrainingReport]:
        """A router trained with all experts; k only for its report."""
        return train_ds_moe(layer, k=experts_kept(layer, context.sparsity), settings=replace(SETTINGS, seed=seed))

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """One method, the same k in every layer."""
        return (self.method("ds-moe", "topk", self.train_all(context, combine="weighted"), ("sparsity",)),)
