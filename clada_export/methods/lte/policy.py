"""LTE, learn to be efficient (arXiv 2402.06126): experts with independent sigmoid routers, those above one threshold run.

The router is trained with the efficiency and separability losses, the model frozen; its efficiency weight is found so that the
threshold 0.5 gives the wanted sparsity. With `--finetune` the routers and low-rank changes of the FFN weights are then trained
together, through the whole model (`clada_export/methods/lte/finetune.py`). With a budget the threshold moves, the same in
all layers (our own derivation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from clada_export.calibration.context import PolicyContext
from clada_export.decoder.ffn import EagerFFN
from clada_export.methods.common.routed import RoutedLayers, RoutedPolicy
from clada_export.methods.lte.finetune import RANK, FinetuneSettings, RoutedFFN, finetune
from clada_export.methods.lte.train import SETTINGS, lte_for_sparsity
from clada_export.methods.training.layer import ExpertLayer
from clada_export.methods.training.train import TrainingReport
from clada_export.plan.adapters import require_own_weights
from clada_export.plan.method import Method
from graph_passes.router import Router


@dataclass(frozen=True, kw_only=True)
class LTEPolicy(RoutedPolicy):
    """Score `external` of experts, rule `threshold`."""

    name: str = "lte"
    finetunes: bool = True

    def check(self, ffns: Sequence[EagerFFN]) -> None:
        """Refuse experts that do not divide an FFN, and fine-tuning of weights that FFNs share."""
        super().check(ffns)
        if self.settings.finetune:
            require_own_weights(ffns)

    def train(self, layer: ExpertLayer, context: PolicyContext, seed: int) -> tuple[Router, TrainingReport]:
        """A router that opens the share of experts which the sparsity leaves."""
        return lte_for_sparsity(layer, context.sparsity, settings=replace(SETTINGS, seed=seed))

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """One method."""
        routed = self.train_all(context)
        if self.settings.finetune:
            return (self.method("finetuned", "threshold", _finetuned(routed, context, self.settings.rank or RANK), ("level",)),)
        return (self.method("lte", "threshold", routed, ("level",)),)


def _finetuned(routed: RoutedLayers, context: PolicyContext, rank: int) -> RoutedLayers:
    """The same layers after fine-tuning."""
    settings = FinetuneSettings(rank=rank, seed=context.seed)
    layers = []
    for ffn, layer in zip(context.ffns, routed.layers, strict=True):
        tensors = routed.arrays[layer.name]
        assert tensors.router is not None
        layers.append(RoutedFFN(ffn, tensors.router, tensors.neurons, layer.granule))
    found = finetune(
        context.decoder,
        layers,
        context.windows,
        context.prompt,
        context.sparsity,
        settings,
        lambda done, total: context.progress("fine-tuning", done, total),
    )
    arrays = {
        layer.name: replace(routed.arrays[layer.name], router=router, adapters=adapters)
        for layer, router, adapters in zip(routed.layers, found.routers, found.adapters, strict=True)
    }
    told = {
        "settings": asdict(settings),
        "epochs": found.epochs,
        "seconds": found.seconds,
        "losses": [found.losses[0], found.losses[-1]],
        "kl_before": found.kl_before,
        "kl_after": found.kl_after,
    }
    changed = tuple(replace(layer, adapter_rank=settings.rank) for layer in routed.layers)
    return RoutedLayers(changed, arrays, {**routed.training, "finetuning": told})
