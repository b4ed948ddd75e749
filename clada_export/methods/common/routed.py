"""What policies with trained routers share: samples, the neurons' order, one router a layer, and how it is told."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from clada_export.calibration.context import PolicyContext
from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UsageError
from clada_export.methods.common.checks import check_granule, check_rank
from clada_export.methods.common.policy import MethodPolicy
from clada_export.methods.training.cluster import cluster_neurons
from clada_export.methods.training.layer import ExpertLayer, group_neurons
from clada_export.methods.training.samples import LayerSamples, collect_samples
from clada_export.methods.training.train import TrainingReport
from clada_export.plan.layer import LayerPlan, RouterForm
from clada_export.plan.method import Method, draft_layers
from clada_export.plan.tensors import LayerTensors
from graph_passes.op import ContractError
from graph_passes.router import Router

GRANULE = 32
"""Neurons of an expert, where the user does not say."""


@dataclass(frozen=True)
class TrainedLayer:
    """A layer's router, the order of its neurons in the engine (None for the model's own), and how the training went."""

    router: Router
    neurons: np.ndarray | None
    report: TrainingReport


@dataclass(frozen=True)
class RoutedLayers:
    """The layers of a method, with their arrays, and what training them took."""

    layers: tuple[LayerPlan, ...]
    arrays: dict[str, LayerTensors]
    training: dict[str, object]


@dataclass(frozen=True, kw_only=True)
class RoutedPolicy(MethodPolicy):
    """A policy whose scores come from a router that is trained on the calibration text, the model's weights frozen.

    A subclass says how one router is trained (`train`) and which rules are measured (`methods`).

    Attributes:
        granule: neurons of an expert, where the user does not say.
        clustered: whether experts are clusters of neurons; else the model's order stays.
    """

    scores: tuple[str, ...] = ("external",)
    trained: bool = True
    granule: int = GRANULE
    clustered: bool = True

    def check(self, ffns: Sequence[EagerFFN]) -> None:
        """Refuse experts that do not divide an FFN, and a rank beyond its sizes."""
        super().check(ffns)
        check_granule(self.name, ffns, self.settings.granule or self.granule)
        check_rank(self.name, ffns, self.settings.rank)

    @abstractmethod
    def train(self, layer: ExpertLayer, context: PolicyContext, seed: int) -> tuple[Router, TrainingReport]:
        """The router of one layer."""

    def train_all(self, context: PolicyContext, **shared: object) -> RoutedLayers:
        """Cluster the neurons of every layer into experts and train its router.

        Args:
            shared: fields of `LayerPlan` that all layers share.
        """
        self.check(context.ffns)
        start = time.perf_counter()
        granule = self.settings.granule or self.granule
        samples = collect_samples(
            context.decoder,
            context.windows,
            self.settings.rows,
            context.seed,
            lambda done, total: context.progress("samples", done, total),
        )

        def one(index: int, kept: np.ndarray | None) -> TrainedLayer:
            layer, neurons = self._experts(samples.layer(index), kept, granule, context.seed)
            router, report = self.train(layer, context, context.seed + index)
            return TrainedLayer(router, neurons, report)

        drafts = draft_layers(context.ffns, granule=granule, **shared)
        return train_layers(self.name, context, drafts, one, rows=int(samples.inputs[0].shape[0]), start=start)

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


def train_layers(
    name: str,
    context: PolicyContext,
    drafts: Sequence[LayerPlan],
    one: Callable[[int, np.ndarray | None], TrainedLayer],
    *,
    rows: int,
    start: float,
) -> RoutedLayers:
    """Train the router of one layer after the other.

    Args:
        name: of the policy, for progress and errors.
        drafts: of the layers, without routers.
        one: trains the router of layer `index`, of which pruning left the neurons `kept` (int64 ascending; None for all).
        rows: that routers are trained on, for the report.
        start: when it began, by `time.perf_counter`.

    Raises:
        UsageError: training gives no router; names the policy and the layer.
    """
    layers: list[LayerPlan] = []
    arrays: dict[str, LayerTensors] = {}
    reports: dict[str, object] = {}
    for index, draft in enumerate(drafts):
        kept = context.kept.get(draft.name)
        with _trained_router(name, draft.name):
            trained = one(index, kept)
        arrays[draft.name] = LayerTensors(trained.router, trained.neurons)
        reports[draft.name] = _told(trained.report)
        layers.append(_with_router(draft, trained, kept))
        context.progress(f"{name} routers", index + 1, len(drafts))
    training = {"rows": rows, "seconds": time.perf_counter() - start, "layers": reports}
    return RoutedLayers(tuple(layers), arrays, training)


def experts_kept(layer: ExpertLayer, sparsity: float) -> int:
    """How many experts a sparsity leaves: at least one."""
    return max(1, min(layer.experts, round((1.0 - sparsity) * layer.experts)))


@contextmanager
def _trained_router(policy: str, layer: str) -> Iterator[None]:
    """What training makes of activations that are far too large or all the same may be no router."""
    try:
        yield
    except ContractError as error:
        raise UsageError(f"policy {policy!r}: {layer}: training on the calibration text gives no router ({error})") from error


def _with_router(draft: LayerPlan, trained: TrainedLayer, kept: np.ndarray | None) -> LayerPlan:
    """The layer's plan with a router."""
    return replace(
        draft,
        router=RouterForm.of(trained.router),
        reordered=trained.neurons is not None,
        kept_neurons=None if kept is None else len(kept),
    )


def _told(report: TrainingReport) -> dict[str, object]:
    """A training as a plan tells it: of the losses the first and the last."""
    return {**asdict(report), "losses": [report.losses[0], report.losses[-1]] if report.losses else []}
