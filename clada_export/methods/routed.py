"""What policies with trained routers share: samples, the neurons' order, one router a layer, and how it is told."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UsageError
from clada_export.methods.base import Dynamic, PolicyContext, PolicySettings, check_granule, check_rank, check_score
from clada_export.methods.training.cluster import cluster_neurons
from clada_export.methods.training.layer import ExpertLayer, group_neurons
from clada_export.methods.training.samples import LayerSamples, collect_samples
from clada_export.methods.training.train import TrainingReport
from clada_export.plan.method import Method, draft_layers
from clada_export.plan.plan import LayerPlan, RouterForm
from clada_export.plan.tensors import LayerTensors
from graph_passes.op import ContractError
from graph_passes.router import Router

GRANULE = 32
"""Neurons of an expert, where the user does not say: MoEfication's and LTE's number."""


@dataclass(frozen=True)
class RoutedLayers:
    """The layers of a method, with their arrays, and what training them took."""

    layers: tuple[LayerPlan, ...]
    arrays: dict[str, LayerTensors]
    training: dict[str, object]


class RoutedPolicy(Dynamic, ABC):
    """A policy whose scores come from a router that is trained on the calibration text, the model's weights frozen.

    A subclass says how one router is trained (`train`) and which rules are measured (`methods`).
    """

    name: str
    trained: bool = True
    responds: bool = False
    scores: tuple[str, ...] = ("external",)
    granule: int = GRANULE
    clustered: bool = True

    def check(self, ffns: Sequence[EagerFFN], settings: PolicySettings) -> None:
        """Refuse experts that do not divide an FFN, and a rank beyond its sizes."""
        check_score(self.name, self.scores, settings)
        check_granule(self.name, ffns, settings.granule or self.granule)
        check_rank(self.name, ffns, settings.rank)

    @abstractmethod
    def train(self, layer: ExpertLayer, context: PolicyContext, seed: int) -> tuple[Router, TrainingReport]:
        """The router of one layer."""

    def train_all(self, context: PolicyContext, **settings: object) -> RoutedLayers:
        """Cluster the neurons of every layer into experts and train its router.

        Args:
            settings: fields of `LayerPlan` that all layers share.
        """
        self.check(context.ffns, context.settings)
        start = time.perf_counter()
        granule = context.settings.granule or self.granule
        samples = collect_samples(
            context.decoder,
            context.windows,
            context.settings.rows,
            context.seed,
            lambda done, total: context.progress("samples", done, total),
        )
        layers: list[LayerPlan] = []
        arrays: dict[str, LayerTensors] = {}
        reports: dict[str, object] = {}
        drafts = draft_layers(context.ffns, granule=granule, **settings)
        for index, draft in enumerate(drafts):
            kept = context.kept.get(draft.name)
            layer, neurons = self._experts(samples.layer(index), kept, granule, context.seed)
            with trained_router(self.name, draft.name):
                router, report = self.train(layer, context, context.seed + index)
            arrays[draft.name] = LayerTensors(router, neurons)
            reports[draft.name] = told(report)
            layers.append(with_router(draft, router, neurons, kept))
            context.progress(f"{self.name} routers", index + 1, len(drafts))
        rows = int(samples.inputs[0].shape[0])
        training = {"rows": rows, "seconds": time.perf_counter() - start, "layers": reports}
        return RoutedLayers(tuple(layers), arrays, training)

    def method(self, label: str, rule: str, routed: RoutedLayers, allocations: tuple[str, ...]) -> Method:
        """A method over trained layers."""
        return Method(label, "external", rule, routed.layers, routed.arrays, allocations, {"training": routed.training})

    def _experts(
        self, samples: LayerSamples, kept: np.ndarray | None, granule: int, seed: int
    ) -> tuple[ExpertLayer, np.ndarray | None]:
        """The layer's samples in expert order, and that order in the model's neurons; None if it is the model's own."""
        ffn, h, w_in, w_out = samples.ffn, samples.h, samples.w_in, samples.ffn.w_out()
        if kept is not None:
            chosen = torch.from_numpy(kept)
            h, w_in, w_out = h[:, chosen], w_in[chosen], w_out[chosen]
        order = cluster_neurons(w_in, granule, seed, name=ffn.name) if self.clustered else None
        layer = group_neurons(samples.x, h, w_in, w_out, order, granule, ffn.activation, ffn.name)
        if order is None or kept is None:
            return layer, order if kept is None else kept
        return layer, kept[order]


@contextmanager
def trained_router(policy: str, layer: str) -> Iterator[None]:
    """What training makes of activations that are far too large or all the same may be no router.

    Raises:
        UsageError: names the policy and the layer.
    """
    try:
        yield
    except ContractError as error:
        raise UsageError(f"policy {policy!r}: {layer}: training on the calibration text gives no router ({error})") from error


def with_router(draft: LayerPlan, router: Router, neurons: np.ndarray | None, kept: np.ndarray | None) -> LayerPlan:
    """The layer's plan with a router.

    Args:
        neurons: their order in the engine, or None for the model's own.
        kept: those that pruning left, or None for all.
    """
    return replace(
        draft,
        router=RouterForm.of(router),
        reordered=neurons is not None,
        kept_neurons=None if kept is None else len(kept),
    )


def told(report: TrainingReport) -> dict[str, object]:
    """A training as a plan tells it: of the losses the first and the last."""
    return {**asdict(report), "losses": [report.losses[0], report.losses[-1]] if report.losses else []}


def experts_kept(layer: ExpertLayer, sparsity: float) -> int:
    """How many experts a sparsity leaves: at least one."""
    return max(1, min(layer.experts, round((1.0 - sparsity) * layer.experts)))
