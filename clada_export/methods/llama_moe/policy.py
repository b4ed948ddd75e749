"""LLaMA-MoE (github.com/pjlab-sys4nlp/llama-moe): a softmax router, the best k experts, outputs weighted by score and scale.

Experts are clusters of the dense model's neurons. LLaMA-MoE then pre-trains the whole model on; here only the router is
trained, to rebuild the FFN's output, so expect far less than the published quality.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from clada_export.calibration.context import PolicyContext
from clada_export.methods.common.routed import RoutedPolicy, experts_kept
from clada_export.methods.llama_moe.train import SETTINGS, train_llama_moe
from clada_export.methods.training.layer import ExpertLayer
from clada_export.methods.training.train import TrainingReport
from clada_export.plan.method import Method
from clada_export.source.mixtures.llama_moe import LAYOUT
from graph_passes.router import Router


@dataclass(frozen=True, kw_only=True)
class LlamaMoEPolicy(RoutedPolicy):
    """Score `external` of experts, rule `topk`, combine `weighted`."""

    name: str = "llama-moe"
    imports: str | None = LAYOUT

    def train(self, layer: ExpertLayer, context: PolicyContext, seed: int) -> tuple[Router, TrainingReport]:
        """A router trained at the k that the sparsity leaves."""
        return train_llama_moe(layer, k=experts_kept(layer, context.sparsity), settings=replace(SETTINGS, seed=seed))

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """One method, the same k in every layer."""
        return (self.method("llama-moe", "topk", self.train_all(context, combine="weighted"), ("sparsity",)),)
