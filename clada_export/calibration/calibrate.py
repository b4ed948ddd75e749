"""The calibration stage: what all policies share, and the entry that hands it to one of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from clada_export.calibration.cache import CalibrationCache, what_selects
from clada_export.calibration.context import MethodMaker, PolicyContext, Progress
from clada_export.calibration.cost import relative_bytes
from clada_export.calibration.drift import Drift, DriftMeter
from clada_export.calibration.jobs import run_sensitivity, run_statistics
from clada_export.calibration.precision import has_fast_products
from clada_export.calibration.selector import Selectors
from clada_export.calibration.soundness import plain
from clada_export.calibration.statistics import CalibrationStatistics
from clada_export.calibration.text import CalibrationData
from clada_export.calibration.weights import FFNWeights, Pruning
from clada_export.calibration.windows import Desk, InProcess, Runner, View
from clada_export.calibration.work import WorkCount
from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UsageError
from clada_export.plan.goal import DEFAULT_BUDGET, Budget, Goal
from clada_export.plan.method import Method, draft_layers
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.record import CalibrationRecord
from clada_export.plan.tensors import LayerTensors

SENSITIVITY_TOKENS = 1024
SENSITIVITY_LENGTH = 256
SENSITIVITY_UNITS, STATISTICS_UNITS = 2.5, 2.0
"""What a window costs in these passes, in forward passes of it: about, for the estimate of what is left."""
SEARCH_PASSES = 8
"""How often the held-out windows are measured, before more is known."""
SENSITIVITY, DENSE, STATISTICS, SEARCH = "sensitivity", "dense", "statistics", "search"
PROMPT = 128
"""Tokens of a window that run dense, as a prompt does; a quarter of shorter windows."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What the user asked for: a budget, or a fixed mean sparsity; and how weights are pruned before, whatever the policy.

    Attributes:
        item: bytes of one weight in the engine, of its FFNs.
        dense: the drift of the model that skips nothing, where it has one: a plan that skips nothing is then taken where none
            that skips keeps the budget; what weights of fewer bits cost is told, and does not end the export.
        rival: the bytes, relative to dense, that another policy reads within the budget: a policy that can't read fewer need
            not be searched for more (`OutdoneError`).
    """

    budget: Budget = field(default_factory=lambda: Budget.parse(DEFAULT_BUDGET))
    sparsity: float | None = None
    prune: Pruning | None = None
    load_response: bool = True
    seed: int = 0
    item: float = 4
    dense: Drift | None = None
    rival: float | None = None

    def keeps(self, drift: Drift) -> bool:
        """Whether a drift is within the budget; a sparsity sets none, and a CETT is kept by the thresholds themselves."""
        return self.sparsity is not None or self.budget.keeps(drift)


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

    def foreseen(self, context: PolicyContext) -> tuple[Method, ...]:
        """The methods that its plan will ask tables of, as far as they are known before anything is measured."""
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


class OutdoneError(UsageError):
    """A policy can't read fewer bytes than another within the budget.

    Attributes:
        cost: what it costs at `sparsity`, where it would read as many (`Budget.cost`); None if it was not measured.
    """

    def __init__(self, message: str, cost: float | None, sparsity: float) -> None:
        super().__init__(message)
        self.cost, self.sparsity = cost, sparsity

    def __reduce__(self) -> tuple[type[OutdoneError], tuple[str, float | None, float]]:
        return type(self), (str(self), self.cost, self.sparsity)


class Calibrator:
    """What one model and one text cost once, whatever the policy: sensitivity, and the dense side of every measurement.

    Drift is from the model as it is given here, also where weights are pruned after.

    Args:
        rounded: called after weights were pruned; puts them back on the grid of the engine's type.
        cache: keeps what can be kept for the next time.
        progress: called with (what, done, total): windows of text, of all that the calibration will take by now's estimate.
        fast: search with products of bfloat16 (`clada_export.calibration.precision`), and measure what is found in float32;
            None does so where the CPU has them.
        runner: makes what runs windows, from this process's desk.
        view: how the model is computed that is measured; the dense side and the sensitivity are those of the model as it is.
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
        fast: bool | None = None,
        runner: Callable[[Desk], Runner] = InProcess,
        view: View | None = None,
    ) -> None:
        self.decoder, self.data, self.seed, self.progress = decoder, data, seed, progress
        self.fast = has_fast_products() if fast is None else fast
        found = cache or CalibrationCache()
        self.cache = replace(found, base={**found.base, "fast": self.fast})
        self.prompt = prompt_length(int(data.calibration.shape[1]))
        self.weights = FFNWeights(decoder, data.calibration, rounded)
        self.runner = runner(Desk(decoder, data.calibration, data.heldout, self.prompt, self.weights))
        self.work = WorkCount(progress)
        self._what = "held-out windows"
        count, length = _short_windows(data)
        backward = SENSITIVITY_UNITS * length / data.heldout.shape[1]
        self.work.expect(SENSITIVITY, backward * count)
        self.work.expect(DENSE, len(data.heldout))
        self.work.expect(STATISTICS, STATISTICS_UNITS * len(data.calibration))
        self.work.expect(SEARCH, SEARCH_PASSES * len(data.heldout))
        self.sensitivity = self.cache.sensitivity(
            lambda: run_sensitivity(
                self.runner,
                count,
                length,
                seed=seed,
                fast=self.fast,
                progress=lambda done, total: self.work.step(SENSITIVITY, "sensitivity", backward),
            )
        )
        self.work.end(SENSITIVITY)
        self.meter = DriftMeter(
            decoder,
            data.heldout,
            self.prompt,
            fast=self.fast,
            cache=self.cache,
            runner=self.runner,
            progress=lambda: self.work.step(DENSE, "dense windows"),
        )
        self.work.end(DENSE)
        self._foreseen: dict[str, CalibrationStatistics] = {}
        self._foreseen_for: Pruning | None = None
        self._as_is = self.cache
        if view is not None:
            self.compute_by(view)

    def compute_by(self, view: View) -> None:
        """Measure the model computed in another way from now on."""
        self.runner.desk.view = view
        self.cache = replace(self._as_is, base={**self._as_is.base, "view": view.key})
        self.meter.cache = self.cache
        self._foreseen = {}

    def dense_drift(self, exact: bool = False) -> Drift:
        """The drift of the model that skips nothing, computed by the view, from the model as it is.

        Args:
            exact: with float32 products.
        """
        layers = draft_layers(self.decoder.ffns)
        (selectors,) = Selectors(self.decoder.ffns, (Method("dense", "exact", "threshold", layers),)).layers
        return self.meter.measure(selectors, np.zeros(len(layers)), step=self.step, exact=exact)

    def step(self) -> None:
        """Count a held-out window."""
        self.work.step(SEARCH, self._what)

    def expect(self, what: str, passes: int) -> None:
        """Say what held-out windows are measured for from now on, and how often all of them will be, about."""
        self._what = f"{what}, held-out windows"
        self.work.expect(SEARCH, passes * len(self.data.heldout))

    def foresee(self, policies: Sequence[Policy], options: CalibrationOptions, sparsity: float) -> None:
        """Make the tables of several policies in one pass over the text, for when they are asked for.

        Args:
            policies: those that can be used here.
            sparsity: that is aimed at first.
        """
        kept = self._pruned(options.prune)
        context = self._context(options, sparsity, kept)
        found = [_without_pruned(method, kept) for policy in policies for method in policy.foreseen(context)]
        methods = list({_named(method): method for method in found}.values())
        if not methods:
            return
        cache = self.cache if options.prune is None else self.cache.of_weights(self.decoder)
        made = self._tables(cache, Selectors(self.decoder.ffns, methods))
        self._foreseen_for = options.prune
        self._foreseen = {
            _named(method): CalibrationStatistics((tables,), made.load)
            for method, tables in zip(methods, made.tables, strict=True)
        }

    def statistics(self, ready: Ready) -> CalibrationStatistics:
        """The tables of what `prepare` has made, and the statistics of the load."""
        if self.weights.pruning == self._foreseen_for and not self.weights.adapted:
            known = [self._foreseen.get(_named(method)) for method in ready.methods]
            found = [item for item in known if item is not None]
            if len(found) == len(known):
                return CalibrationStatistics(tuple(item.tables[0] for item in found), found[0].load)
        return self._tables(ready.cache, Selectors(self.decoder.ffns, ready.methods))

    def _tables(self, cache: CalibrationCache, selectors: Selectors) -> CalibrationStatistics:
        def collect(missing: Selectors) -> CalibrationStatistics:
            return run_statistics(
                self.runner,
                missing.methods,
                fast=self.fast,
                progress=lambda done, total: self.work.step(STATISTICS, "statistics", STATISTICS_UNITS),
            )

        found = cache.statistics(selectors, self.prompt, collect)
        self.work.end(STATISTICS)
        return found

    def calibrate(self, policy: Policy, source: dict[str, Any], options: CalibrationOptions) -> CalibrationResult:
        """Make a sparsity plan; see the function `calibrate`. The model's weights are left pruned as the plan says."""
        policy.check(self.decoder.ffns)
        return policy.plan(self, source, options)

    def prepare(self, maker: MethodMaker, options: CalibrationOptions, pruning: Pruning | None, sparsity: float) -> Ready:
        """Bring the weights into their state, and let a policy make its methods for them.

        Args:
            sparsity: that is aimed at first.
        """
        kept = self._pruned(pruning)
        context = self._context(options, sparsity, kept)
        cache = self.cache if pruning is None else self.cache.of_weights(self.decoder)
        methods = tuple(_without_pruned(method, kept) for method in cache.methods(maker, context))
        # All methods of a policy that trains the weights are made for the same ones.
        self.weights.adapt(methods[0].arrays)
        if self.weights.adapted:
            cache = cache.of_weights(self.decoder)
        self.meter.cache = cache
        return Ready(methods, cache)

    def _pruned(self, pruning: Pruning | None) -> dict[str, np.ndarray]:
        """Prune the weights; the neurons that are left, by FFN."""
        self.weights.use(pruning, lambda done, total: self.progress("pruning", done, total))
        return {} if self.weights.report is None else dict(self.weights.report.kept)

    def _context(self, options: CalibrationOptions, sparsity: float, kept: dict[str, np.ndarray]) -> PolicyContext:
        return PolicyContext(
            self.decoder,
            self.data.calibration,
            sparsity=sparsity,
            prompt=self.prompt,
            kept=kept,
            seed=options.seed,
            progress=self.progress,
        )

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
    runner: Callable[[Desk], Runner] = InProcess,
    view: View | None = None,
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
        runner: makes what runs windows, from this process's desk.
        view: how the model is computed that is measured.

    Raises:
        UsageError: a policy that the FFNs can't carry, activations that are not finite, a budget that nothing meets.
    """
    policy.check(decoder.ffns)
    calibrator = Calibrator(
        decoder, data, seed=options.seed, rounded=rounded, cache=cache, progress=progress, runner=runner, view=view
    )
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


def _named(method: Method) -> str:
    """What a method's tables depend on beside the weights and the text."""
    return json.dumps(what_selects(method), sort_keys=True, default=str)


def _short_windows(data: CalibrationData) -> tuple[int, int]:
    """How many of the calibration windows the sensitivity reads, and how many tokens of each."""
    length = min(SENSITIVITY_LENGTH, data.calibration.shape[1])
    return min(len(data.calibration), max(1, SENSITIVITY_TOKENS // length)), length
