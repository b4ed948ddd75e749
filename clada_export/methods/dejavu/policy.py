"""DejaVu (arXiv 2310.17157): a low-rank predictor of each layer says which neurons will matter.

Linear(d, r) -> Linear(r, f), nothing between, trained offline on calibration activations with DejaVu's weighted cross-entropy.
Labels are h != 0 for ReLU; for smooth activations the neurons with the largest |h_j| * ||W_d[:, j]|| (our own derivation).
DejaVu feeds the attention's input; here it is the FFN's input, which the exported graph has at hand. Recall is in the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from clada_export.calibration.context import PolicyContext
from clada_export.methods.common.routed import RoutedPolicy
from clada_export.methods.dejavu.train import SETTINGS, train_dejavu
from clada_export.methods.training.layer import RELU_LIKE, ExpertLayer
from clada_export.methods.training.train import TrainingReport
from clada_export.plan.method import Method
from graph_passes.router import Router


@dataclass(frozen=True, kw_only=True)
class DejaVuPolicy(RoutedPolicy):
    """Score `external` of single neurons; rule `topk` as published, and `threshold`, whichever is better."""

    name: str = "dejavu"
    granule: int = 1
    clustered: bool = False

    def train(self, layer: ExpertLayer, context: PolicyContext, seed: int) -> tuple[Router, TrainingReport]:
        """A predictor of the neurons that the sparsity leaves."""
        has_zeros = layer.activation in RELU_LIKE and layer.granule == 1
        share = None if has_zeros else min(max(1.0 - context.sparsity, 0.05), 0.95)
        settings = replace(SETTINGS, seed=seed)
        return train_dejavu(layer, rank=self.settings.rank, label_share=share, settings=settings)

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """Top-k, and a threshold on the predicted probability."""
        routed = self.train_all(context)
        allocations = ("sparsity", "fisher")
        return (
            self.method("top-k", "topk", routed, allocations),
            self.method("threshold", "threshold", routed, allocations),
        )
