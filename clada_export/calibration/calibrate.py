"""The calibration stage: what all policies share, and the entry that hands it to one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from clada_export.calibration.budget import Budget
from clada_export.calibration.cache import CalibrationCache
from clada_export.calibration.context import MethodMaker, PolicyContext, Progress
from clada_export.calibration.cost import relative_bytes
from clada_export.calibration.drift import Drift, DriftMeter
from clada_export.calibration.sensitivity import layer_sensitivity
from clada_export.calibration.soundness import plain
from clada_export.calibration.text import CalibrationData
from clada_export.calibration.weights import FFNWeights, Pruning
from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn import EagerFFN
from clada_export.plan.goal import Goal
from clada_export.plan.method import Method
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.record import CalibrationRecord
from clada_export.plan.tensors import LayerTensors

SENSITIVITY_TOKENS = 1024
SENSITIVITY_LENGTH = 256
PROMPT = 128
"""Tokens of a window that run dense, as a prompt does; a quarter of shorter windows."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What the user asked for: a budget, or a fixed mean sparsity; and how weights are pruned before, whatever the policy.
    `item` is the bytes of one weight in the engine."""

    budget: Budget = field(default_factory=lambda: Budget("ppl", 0.02))
    sparsity: float | None = None
    prune: Pruning | None = None
    load_response: bool = True
    seed: int = 0
    item: int = 4

    def keeps(self, drift: Drift) -> bool:
        """Whether a drift is within the budget; a sparsity sets none, and a CETT is kept by the thresholds themselves."""
        if self.sparsity is not None or self.budget.metric == "cett":
            return True
        return self.budget.cost(drift) <= self.budget.limit


@dataclass(frozen=True)
class CalibrationResult:
    """The plan, and what was measured on the way to it.

    Attributes:
        sensitivity: of every layer.
        pruning: how the weights were pruned for it.
    """

    plan: SparsityPlan
    drift: Drift
    sensitivity: tuple[float, ...]
    pruning: Pruning | None = None

    @property
    def details(self) -> dict[str, Any]:
        """What a report shows, plain JSON values."""
        return {**self.plan.calibration.to_dict(), "sensitivity": list(self.sensitivity)}


class Policy(Protocol):
    """A policy as calibration sees it: it knows itself which way leads to a plan of it.

    The ways there are: `clada_export.calibration.thresholds` and `clada_export.calibration.segment_state`.
    """

    @property
    def name(self) -> str:
        """What `--policy` calls it."""
        ...

    @property
    def trained(self) -> bool:
        """Whether it trains routers on the calibration text."""
        ...

    def check(self, ffns: Sequence[EagerFFN]) -> None:
        """Refuse, before any work, a model that can't carry the policy.

        Raises:
            UsageError: names the layer and the reason.
        """
        ...

    def left_out(self, ffns: Sequence[EagerFFN]) -> str | None:
        """Why a choice among policies does not measure it for this model; None if it does."""
        ...

    def plan(self, calibrator: Calibrator, source: dict[str, Any], options: CalibrationOptions) -> CalibrationResult:
        """Make a sparsity plan; the model's weights are left pruned as it says.

        Args:
            source: goes into the plan; holds at least `weights_digest`.

        Raises:
            UsageError: settings that do not fit, a budget that nothing meets.
        """
        ...


@dataclass(frozen=True)
class Ready:
    """What a policy has made for the weights as they are: its methods, plainest first, and where their statistics are kept."""

    methods: tuple[Method, ...]
    cache: CalibrationCache


class Calibrator:
    """What one model and one text cost once, whatever the policy: sensitivity, and the dense side of every measurement.

    Drift is from the model as it is given here, also where weights are pruned after.

    Args:
        rounded: called after weights were pruned; puts them back on the grid of the engine's type.
        cache: keeps what can be kept for the next time.
        progress: called with (what, done, total).
    """

    def __init__(
        self,
        decoder: Decoder,
        data: CalibrationData,
        *,
        seed: int = 0,
        rounded: Callable[[], None] = lambda: None,
        cache: CalibrationCache | None = None,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        self.decoder, self.data, self.seed, self.progress = decoder, data, seed, progress
        self.cache = cache or CalibrationCache()
        self.prompt = prompt_length(int(data.calibration.shape[1]))
        self.sensitivity = self.cache.sensitivity(
            lambda: layer_sensitivity(
                decoder, _short_windows(data), seed=seed, progress=lambda done, total: progress("sensitivity", done, total)
            )
        )
        self.meter = DriftMeter(decoder, data.heldout, self.prompt)
        self.weights = FFNWeights(decoder, data.calibration, rounded)
        self._measured = 0

    def step(self) -> None:
        """Count a held-out window."""
        self._measured += 1
        self.progress("held-out windows", self._measured, 0)

    def calibrate(self, policy: Policy, source: dict[str, Any], options: CalibrationOptions) -> CalibrationResult:
        """Make a sparsity plan; see the function `calibrate`. The model's weights are left pruned as the plan says."""
        policy.check(self.decoder.ffns)
        return policy.plan(self, source, options)

    def prepare(self, maker: MethodMaker, options: CalibrationOptions, pruning: Pruning | None, sparsity: float) -> Ready:
        """Bring the weights into their state, and let a policy make its methods for them.

        Args:
            sparsity: that is aimed at first.
        """
        self.weights.use(pruning, lambda done, total: self.progress("pruning", done, total))
        kept = {} if self.weights.report is None else dict(self.weights.report.kept)
        context = PolicyContext(
            self.decoder,
            self.data.calibration,
            sparsity=sparsity,
            prompt=self.prompt,
            kept=kept,
            seed=options.seed,
            progress=self.progress,
        )
        cache = self.cache if pruning is None else self.cache.of_weights(self.decoder)
        methods = tuple(_without_pruned(method, kept) for method in cache.methods(maker, context))
        # All methods of a policy that trains the weights are made for the same ones.
        self.weights.adapt(methods[0].arrays)
        if self.weights.adapted:
            cache = cache.of_weights(self.decoder)
        return Ready(methods, cache)

    def record(self, options: CalibrationOptions, method: Method) -> CalibrationRecord:
        """What a plan says about the text, the goal and the method."""
        return CalibrationRecord(
            text=self.data.origin,
            digest=self.data.digest,
            calibration_tokens=int(self.data.calibration.numel()),
            context=int(self.data.calibration.shape[1]),
            heldout_tokens=int(self.data.heldout.numel()),
            prompt_tokens=self.prompt,
            goal=Goal.of(options.budget, options.sparsity),
            variant=method.label,
            details=plain(method.details),
        )

    def result(
        self, plan: SparsityPlan, drift: Drift, record: CalibrationRecord, options: CalibrationOptions
    ) -> CalibrationResult:
        """A plan for the weights as they are, with the record of how it was found."""
        record = replace(record, drift=plain(drift.summary()), relative_bytes=relative_bytes(plan, options.item))
        pruning, report = self.weights.pruning, self.weights.report
        if report is not None:
            record = replace(record, pruning=plain({**report.to_dict(), "text_digest": self.data.digest}))
            plan = replace(plan, prune=str(pruning))
        return CalibrationResult(replace(plan, calibration=record), drift, tuple(self.sensitivity), pruning)


def calibrate(
    decoder: Decoder,
    policy: Policy,
    data: CalibrationData,
    source: dict[str, Any],
    options: CalibrationOptions,
    progress: Progress = lambda what, done, total: None,
    *,
    rounded: Callable[[], None] = lambda: None,
    cache: CalibrationCache | None = None,
) -> CalibrationResult:
    """Make a sparsity plan for a decoder.

    The statistics, the gradient pass and whatever a policy trains read `data.calibration`; every decision (variant, allocation,
    sparsity, load response) is measured on `data.heldout`, the first tokens of each window dense and the others sparse, as an
    engine runs them.

    Args:
        source: goes into the plan; holds at least `weights_digest`.
        progress: called with (what, done, total).
        rounded: called after weights were pruned; puts them back on the grid of the engine's type.
        cache: keeps what can be kept for the next time.

    Raises:
        UsageError: a policy that the FFNs can't carry, activations that are not finite, a budget that nothing meets.
    """
    policy.check(decoder.ffns)
    calibrator = Calibrator(decoder, data, seed=options.seed, rounded=rounded, cache=cache, progress=progress)
    return calibrator.calibrate(policy, source, options)


def prompt_length(context: int) -> int:
    """How many tokens of a window are its prompt."""
    return max(1, min(PROMPT, context // 4))


def _without_pruned(method: Method, kept: dict[str, np.ndarray]) -> Method:
    """The method with the neurons that pruning removed left out of the engine, where it does not order them itself."""
    layers, arrays = [], dict(method.arrays)
    for layer in method.layers:
        tensors = arrays.get(layer.name, LayerTensors())
        if layer.name in kept and tensors.neurons is None:
            arrays[layer.name] = replace(tensors, neurons=kept[layer.name])
            layer = replace(layer, kept_neurons=len(kept[layer.name]))
        layers.append(layer)
    return replace(method, layers=tuple(layers), arrays=arrays)


def _short_windows(data: CalibrationData) -> Tensor:
    length = min(SENSITIVITY_LENGTH, data.calibration.shape[1])
    return data.calibration[:, :length][: max(1, SENSITIVITY_TOKENS // length)]
