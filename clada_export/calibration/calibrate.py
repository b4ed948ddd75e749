"""Choose thresholds: statistics, allocation, budget search, load response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from clada_export.calibration.allocation import Allocation, Layers, allocate
from clada_export.calibration.axis import AXES
from clada_export.calibration.budget import Budget, BudgetUnmetError, SearchStep, search_sparsity
from clada_export.calibration.cache import CalibrationCache
from clada_export.calibration.cost import relative_bytes
from clada_export.calibration.drift import Drift, DriftMeter
from clada_export.calibration.load_response import LOAD_SLOPE, fit_load_response
from clada_export.calibration.merged import measure_merged
from clada_export.calibration.selector import LayerSelector, Selectors
from clada_export.calibration.sensitivity import layer_sensitivity
from clada_export.calibration.soundness import plain
from clada_export.calibration.statistics import LayerTable, collect_statistics
from clada_export.calibration.text import CalibrationData
from clada_export.calibration.weights import FFNWeights
from clada_export.decoder.decoder import Decoder
from clada_export.errors import UsageError
from clada_export.methods import Policy, PolicyContext, PolicySettings
from clada_export.methods.base import check_finetune
from clada_export.methods.pruning import PruneReport, PruneSpec
from clada_export.plan.goal import Goal
from clada_export.plan.method import Method
from clada_export.plan.plan import LayerPlan, LoadSignal, SparsityPlan
from clada_export.plan.record import CalibrationRecord, ComparedVariant, SearchedSparsity, TriedResponse
from clada_export.plan.tensors import LayerTensors

SENSITIVITY_TOKENS = 1024
SENSITIVITY_LENGTH = 256
COMPARE_AT = 0.45
"""The sparsity at which allocations and variants are compared when a budget is given."""
LOAD_MIN, LOAD_MAX = 0.25, 4.0
"""Bounds of m(load) in the engine: a load of -4..4 does not reach them at the op's slope, only one from outside does."""
PROMPT = 128
"""Tokens of a window that run dense, as a prompt does; a quarter of shorter windows."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CalibrationOptions:
    """What the user asked for: a budget, or a fixed mean sparsity; of the policy, `settings`; and how weights are pruned
    before, whatever the policy. `item` is the bytes of one weight in the engine."""

    budget: Budget = field(default_factory=lambda: Budget("ppl", 0.02))
    sparsity: float | None = None
    settings: PolicySettings = field(default_factory=PolicySettings)
    prune: PruneSpec | None = None
    load_response: bool = True
    seed: int = 0
    item: int = 4


@dataclass(frozen=True)
class CalibrationResult:
    """The plan, and what was measured on the way to it; `sensitivity` is that of every layer."""

    plan: SparsityPlan
    drift: Drift
    sensitivity: tuple[float, ...]

    @property
    def details(self) -> dict[str, Any]:
        """What a report shows, plain JSON values."""
        return {**self.plan.calibration.to_dict(), "sensitivity": list(self.sensitivity)}


@dataclass(frozen=True)
class _Ready:
    """What a policy has made for the weights as they are: its methods, plainest first, and where their statistics are kept;
    `pruning` says how the weights were pruned."""

    methods: tuple[Method, ...]
    cache: CalibrationCache
    pruning: PruneReport | None


@dataclass(frozen=True)
class AllocatedMethod:
    """A method with its layers' shares settled by an allocation, and its drift at the sparsity of comparison."""

    method: Method
    layers: tuple[LayerSelector, ...]
    allocation: Allocation
    drift: Drift

    def compared(self) -> ComparedVariant:
        """What a plan tells of it."""
        return ComparedVariant(self.method.label, self.allocation.name, self.drift.mean_kl, self.drift.sparsity)


def prompt_length(context: int) -> int:
    """How many tokens of a window are its prompt."""
    return max(1, min(PROMPT, context // 4))


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
        check_finetune(policy, options.settings, options.prune is not None)
        policy.check(self.decoder.ffns, options.settings)
        if policy.prune_at(0.5, PolicySettings()) is not None:
            return self._static(policy, source, options)
        if policy.merges:
            return self._merged(policy, source, options)
        return self._dynamic(policy, source, options, options.prune)

    def _static(self, policy: Policy, source: dict[str, Any], options: CalibrationOptions) -> CalibrationResult:
        """A plan that only prunes: the search, if there is a budget, is over how much."""
        if options.prune is not None:
            raise UsageError(f"--policy {policy.name} prunes by itself; leave --prune out")
        settings = options.settings
        group = settings.pattern is not None and ":" in settings.pattern
        if options.sparsity is not None or group:
            sparsity = (
                options.sparsity
                if options.sparsity is not None
                else PruneSpec.parse(f"{policy.name}={settings.pattern}").sparsity
            )
            fixed = replace(options, sparsity=sparsity)
            result = self._dynamic(policy, source, fixed, policy.prune_at(sparsity, settings))
            if options.sparsity is None and not _keeps(result.drift, options):
                raise BudgetUnmetError(
                    f"--pattern {settings.pattern} costs {options.budget.cost(result.drift):.4g} on the held-out text, and the "
                    f"budget is {options.budget}. Give a larger --budget, or another --pattern",
                    options.budget.cost(result.drift),
                    sparsity,
                )
            return result
        if options.budget.metric == "cett":
            raise UsageError(f"--policy {policy.name} has no CETT budget; give ppl=..., kl=... or --sparsity")
        results: dict[float, CalibrationResult] = {}

        def measure(sparsity: float) -> Drift:
            fixed = replace(options, sparsity=sparsity)
            results[sparsity] = self._dynamic(policy, source, fixed, policy.prune_at(sparsity, settings))
            return results[sparsity].drift

        found, steps = search_sparsity(options.budget, measure, first=COMPARE_AT)
        self.weights.use(policy.prune_at(found.sparsity, settings))
        result = results[found.sparsity]
        made = replace(result.plan.calibration, search=_history(steps), goal=Goal.of(options.budget, None))
        return replace(result, plan=replace(result.plan, calibration=made))

    def _merged(self, policy: Policy, source: dict[str, Any], options: CalibrationOptions) -> CalibrationResult:
        """A plan that merges experts: two of them where a budget is given, since more cost more."""
        ready = self._prepare(policy, options, options.prune, options.sparsity if options.sparsity is not None else 0.5)
        (method,) = ready.methods
        found = measure_merged(self.meter, self.decoder.ffns, method, self.step)
        layers = tuple(
            replace(layer, expected_sparsity=1.0 - 1.0 / (layer.merge or 1), expected_cett=float(error))
            for layer, error in zip(method.layers, found.error, strict=True)
        )
        skipped = sum(layer.width * layer.expected_sparsity for layer in layers)
        drift = replace(found.drift, sparsity=skipped / sum(layer.width for layer in layers))
        if options.sparsity is None:
            cett = options.budget.metric == "cett"
            cost = float(found.error.max()) if cett else options.budget.cost(drift)
            if cost > options.budget.limit:
                raise BudgetUnmetError(
                    f"no sparsity keeps the budget {options.budget}: merging {method.layers[0].merge} experts, the least that "
                    f"policy {policy.name!r} can do, already costs {cost:.4g}. Give a larger --budget, or another --policy",
                    cost,
                    drift.sparsity,
                )
        plan = _plan(policy, method, layers, self._load_signal(), source)
        record = replace(self._record(options, method), allocation="sparsity")
        return self._finish(plan, drift, ready, options, record)

    def _prepare(self, policy: Policy, options: CalibrationOptions, prune: PruneSpec | None, sparsity: float) -> _Ready:
        """Bring the weights into their state, and let the policy make its methods for them."""
        self.weights.use(prune, lambda done, total: self.progress("pruning", done, total))
        report = self.weights.report
        kept = {} if report is None else dict(report.kept)
        context = PolicyContext(
            self.decoder,
            self.data.calibration,
            sparsity=sparsity,
            prompt=self.prompt,
            kept=kept,
            seed=options.seed,
            settings=options.settings,
            progress=self.progress,
        )
        cache = self.cache if prune is None else self.cache.of_weights(self.decoder)
        methods = tuple(_without_pruned(method, kept) for method in cache.methods(policy, context))
        # All methods of a policy that trains the weights are made for the same ones.
        self.weights.adapt(methods[0].arrays)
        if self.weights.adapted:
            cache = cache.of_weights(self.decoder)
        return _Ready(methods, cache, report)

    def _finish(
        self, plan: SparsityPlan, drift: Drift, ready: _Ready, options: CalibrationOptions, record: CalibrationRecord
    ) -> CalibrationResult:
        """The plan with what is told of it; `record` is that of the way it was found."""
        record = replace(record, drift=plain(drift.summary()), relative_bytes=relative_bytes(plan, options.item))
        if ready.pruning is not None:
            record = replace(record, pruning=plain({**ready.pruning.to_dict(), "text_digest": self.data.digest}))
            plan = replace(plan, prune=str(ready.pruning.spec))
        return CalibrationResult(replace(plan, calibration=record), drift, tuple(self.sensitivity))

    def _load_signal(self) -> LoadSignal:
        """Mean and deviation of surprisal and entropy on the held-out text, where no statistics were collected."""
        surprisal, entropy = self.meter.signals.double().unbind(1)

        def deviation(values: Tensor) -> float:
            return max(float(values.std(correction=0)), 1e-6)

        return LoadSignal(float(surprisal.mean()), deviation(surprisal), float(entropy.mean()), deviation(entropy), 0.0, 0.0)

    def _record(self, options: CalibrationOptions, method: Method) -> CalibrationRecord:
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

    def _dynamic(
        self, policy: Policy, source: dict[str, Any], options: CalibrationOptions, prune: PruneSpec | None
    ) -> CalibrationResult:
        aimed = options.sparsity if options.sparsity is not None else COMPARE_AT
        ready = self._prepare(policy, options, prune, aimed)
        selectors = Selectors(self.decoder.ffns, ready.methods)
        statistics = ready.cache.statistics(
            selectors,
            self.prompt,
            lambda missing: collect_statistics(
                self.decoder,
                missing,
                self.data.calibration,
                self.prompt,
                lambda done, total: self.progress("statistics", done, total),
            ),
        )
        candidates = self._candidates(selectors, statistics.tables, aimed, options)
        best = _best(candidates)

        sparsity, levels, drift, history = self._settle(best, aimed, options)
        signal = statistics.load
        tried: tuple[TriedResponse, ...] = ()
        if options.load_response and policy.responds:
            response = fit_load_response(
                self.meter, best.layers, best.allocation, sparsity, statistics.load, drift, levels, self.step
            )
            # A response must not break the budget that was just met.
            if _keeps(response.drift, options):
                signal, levels, drift = response.signal, response.levels, response.drift
            tried = response.tried
        record = replace(
            self._record(options, best.method),
            allocation=best.allocation.name,
            compared=tuple(candidate.compared() for candidate in candidates),
            search=history,
            load_response=tried,
        )
        plan = _plan(policy, best.method, _settled(best, levels), signal, source)
        return self._finish(plan, drift, ready, options, record)

    def _candidates(
        self, selectors: Selectors, tables: tuple[tuple[LayerTable, ...], ...], aimed: float, options: CalibrationOptions
    ) -> list[AllocatedMethod]:
        """The plainest method under each of its allocations, then its variants under the best of these."""
        found: list[AllocatedMethod] = []
        wanted = options.settings.allocation
        for index, method in enumerate(selectors.methods):
            layers = Layers(
                AXES[method.rule], tables[index], tuple(layer.width for layer in method.layers), tuple(self.sensitivity)
            )
            names = method.allocations if wanted is None else (wanted,)
            if index and wanted is None:
                names = (min(found, key=lambda candidate: candidate.drift.mean_kl).allocation.name,)
            # A CETT target is by definition the same in all layers.
            if options.sparsity is None and options.budget.metric == "cett":
                names = ("cett",)
            for name in names:
                allocation = allocate(name, layers)
                drift = self.meter.measure(selectors.layers[index], allocation.levels_for(aimed), step=self.step)
                found.append(AllocatedMethod(method, selectors.layers[index], allocation, drift))
        return found

    def _settle(
        self, best: AllocatedMethod, aimed: float, options: CalibrationOptions
    ) -> tuple[float, np.ndarray, Drift, tuple[SearchedSparsity, ...]]:
        """(sparsity, levels, drift, the search's history) that the user's goal asks for."""
        allocation = best.allocation
        if options.sparsity is not None:
            return aimed, allocation.levels_for(aimed), best.drift, ()
        if options.budget.metric == "cett":
            levels = allocation.levels_at(options.budget.limit)
            return allocation.mean_sparsity(levels), levels, self.meter.measure(best.layers, levels, step=self.step), ()

        def measure(wanted: float) -> Drift:
            if wanted == aimed:
                return best.drift
            return self.meter.measure(best.layers, allocation.levels_for(wanted), step=self.step)

        found, steps = search_sparsity(options.budget, measure, first=aimed)
        return found.sparsity, allocation.levels_for(found.sparsity), found.drift, _history(steps)


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
    policy.check(decoder.ffns, options.settings)
    return Calibrator(decoder, data, seed=options.seed, rounded=rounded, cache=cache, progress=progress).calibrate(
        policy, source, options
    )


def _best(candidates: Sequence[AllocatedMethod]) -> AllocatedMethod:
    """The candidate with the lowest mean KL; a variant has to beat the plainest method clearly.

    A variant costs state or time of its own, so it is taken only if its mean KL is lower by more than one standard error of the
    paired difference over windows.
    """
    plainest = candidates[0].method
    best = min((item for item in candidates if item.method is plainest), key=lambda item: item.drift.mean_kl)
    for item in candidates:
        if item.method is plainest:
            continue
        gain, error = item.drift.gain_over(best.drift)
        if gain > error:
            best = item
    return best


def _keeps(drift: Drift, options: CalibrationOptions) -> bool:
    if options.sparsity is not None or options.budget.metric == "cett":
        return True
    return options.budget.cost(drift) <= options.budget.limit


def _history(steps: Sequence[SearchStep]) -> tuple[SearchedSparsity, ...]:
    return tuple(SearchedSparsity(item.sparsity, item.cost, item.drift.mean_kl) for item in steps)


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


def _settled(best: AllocatedMethod, levels: np.ndarray) -> tuple[LayerPlan, ...]:
    """The layers with their thresholds."""
    layers, axis = [], best.allocation.layers.axis
    for layer, table, level in zip(best.method.layers, best.allocation.layers.tables, levels, strict=True):
        threshold = axis.threshold(float(level), layer.width // layer.granule)
        layers.append(
            replace(
                layer,
                threshold=(threshold,),
                load_slope=LOAD_SLOPE,
                load_min=LOAD_MIN,
                load_max=LOAD_MAX,
                expected_sparsity=float(table.sparsity_at(level)),
                expected_cett=table.cett_at(float(level)),
            )
        )
    return tuple(layers)


def _plan(
    policy: Policy, method: Method, layers: tuple[LayerPlan, ...], signal: LoadSignal, source: dict[str, Any]
) -> SparsityPlan:
    return SparsityPlan(policy.name, method.score, method.rule, layers, signal, source, arrays=dict(method.arrays))


__all__ = ["CalibrationOptions", "CalibrationResult", "Calibrator", "calibrate"]
