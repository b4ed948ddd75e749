"""The calibrate stage as an export runs it: which plans are taken, which text, and which way to a plan."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from clada_export.calibration import Budget, CalibrationData, CalibrationOptions, calibrate, load_calibration_data
from clada_export.calibration.cache import CalibrationCache
from clada_export.calibration.calibrate import Calibrator, prompt_length
from clada_export.calibration.choose import AUTO, choose, plan_clock
from clada_export.calibration.forms import FormCandidate, calibrate_forms
from clada_export.calibration.weights import FFNWeights
from clada_export.decoder.decoder import Decoder
from clada_export.errors import UnsupportedModelError, UsageError
from clada_export.export_options import ExportOptions, quantises
from clada_export.methods import all_policies, get_policy
from clada_export.methods.imported import import_plan, is_imported, takes_experts
from clada_export.methods.static import PruneSpec, WeightPruning
from clada_export.plan.fit import require_finite_weights, require_fit
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.record import CalibrationRecord
from clada_export.plan.schema import SHORTEST_CONTEXT
from clada_export.plan.targets import merging_refused
from clada_export.plan.weights_form import AUTO as AUTO_WEIGHTS
from clada_export.plan.weights_form import COMPENSATED, FORMS, WeightsForm
from clada_export.quantise.make import make_store
from clada_export.quantise.matrices import find_matrices
from clada_export.quantise.store import QuantStore, matrix_sizes
from clada_export.quantise.view import QuantisedView
from clada_export.source.load import SourceModel
from clada_export.targets.common import Target
from clada_export.workers.start import Runners, calibrating, parse_pool


def check_goals(plan: SparsityPlan, origin: str, target: str) -> None:
    """Refuse what can be refused without the model: pruning that is none, and what the target does not have.

    Raises:
        UsageError: names the plan and the field.
    """
    try:
        if plan.prune is not None:
            PruneSpec.parse(plan.prune)
    except UsageError as error:
        raise UsageError(f"{origin}: {error}") from error
    WeightsForm.from_dict(plan.source.get("weights"), origin)
    refused = merging_refused(target, plan.policy) if any(layer.merge is not None for layer in plan.layers) else None
    if refused is not None:
        raise UsageError(f"{origin}: {refused}")


def check_plan_weights(plan: SparsityPlan, options: ExportOptions) -> ExportOptions:
    """The options with the form of weights that a plan was made with.

    Args:
        options: as they were given.

    Raises:
        UsageError: they ask for another form, or the target does not have it.
    """
    form = WeightsForm.from_dict(plan.source.get("weights"), str(options.plan))
    made = None if form is None else form.name
    asked = options.weights
    if (made or asked) and asked is not None and asked != made and (made is not None or quantises(asked)):
        raise UsageError(
            f"{options.plan}: the plan was made with weights {made or plan.source.get('dtype', 'float32')}, and --weights asks "
            f"for {asked}; thresholds are those of one form, so leave --weights out or calibrate again"
        )
    return options if made is None else replace(options, weights=made, policy=plan.policy)


def read_data(source: SourceModel, options: ExportOptions) -> CalibrationData:
    """The token windows that the options ask for, no longer than the model takes."""
    context = calibration_context(source, options.calibration_context)
    return load_calibration_data(
        source.tokenizer,
        source.decoder.vocab_size,
        text_file=options.calibration_data,
        tokens_file=options.calibration_tokens,
        context=context,
        seed=options.seed,
    )


def calibration_context(source: SourceModel, wanted: int) -> int:
    """How many tokens a calibration window has: as many as are wanted, or as the model takes.

    Raises:
        UnsupportedModelError: the model takes fewer than `SHORTEST_CONTEXT`.
    """
    limit = source.decoder.sequence_limit
    if limit is not None and limit < SHORTEST_CONTEXT:
        raise UnsupportedModelError(
            f"{source.name} takes sequences of {limit} tokens by its configuration; at least {SHORTEST_CONTEXT} are needed"
        )
    return wanted if limit is None else min(wanted, limit)


@dataclass(frozen=True)
class Planned:
    """What an export is to be.

    Attributes:
        plan: what every FFN is to do.
        details: what its making measured.
        store: the quantised matrices, or None for weights that are numbers of a type.
        warnings: sentences for the manifest.
    """

    plan: SparsityPlan
    details: dict[str, Any]
    store: QuantStore | None = None
    warnings: tuple[str, ...] = ()


def make_plan(
    source: SourceModel,
    data: CalibrationData,
    given: SparsityPlan | None,
    options: ExportOptions,
    target: Target,
    progress: Callable[[str, int, int], None],
    note: Callable[[str], None],
) -> Planned:
    """The plan of an export: the user's own, the checkpoint's, or a calibrated one. Weights are left pruned as it says.

    Args:
        given: what `--plan` read, or None.
        progress: called with (what, done, total).
        note: called with a sentence for the stage's line.

    Raises:
        UsageError: a plan for another model, or as `clada_export.calibration.calibrate`.
    """
    decoder = source.decoder
    rounded = partial(round_weights, target, decoder, options.dtype)
    if given is not None:
        require_fit(given, decoder.ffns, source.weights_digest, str(options.plan))
        weights_again(given, decoder, data, rounded, str(options.plan))
        require_finite_weights(given, decoder.ffns)
        return Planned(given, given.calibration.to_dict(), store_again(given, decoder, data, str(options.plan), progress))
    origin = {"name": source.name, "weights_digest": source.weights_digest, "dtype": options.dtype}
    if is_imported(decoder):
        record = CalibrationRecord(text=data.origin, digest=data.digest, context=int(data.calibration.shape[1]))
        plan = import_plan(decoder, origin, record, getattr(torch, options.dtype).itemsize)
        return Planned(plan, plan.calibration.to_dict())
    calibration = CalibrationOptions(
        budget=Budget.parse(options.budget),
        sparsity=options.sparsity,
        prune=None if options.prune is None else WeightPruning.parse(options.prune),
        load_response=options.load_response,
        seed=options.seed,
        item=getattr(torch, options.dtype).itemsize,
    )
    cache = CalibrationCache.of(options.calibration_cache, decoder, data.calibration, options.seed, note)
    if options.weights is not None and quantises(options.weights):
        calibrator = Calibrator(decoder, data, seed=options.seed, cache=cache, progress=progress)
        return _quantised(calibrator, origin, calibration, options, progress, note)
    with _runners(source, data, options, progress, note) as runner:
        if options.policy != AUTO:
            policy = get_policy(options.policy, options.settings)
            result = calibrate(
                decoder, policy, data, origin, calibration, progress, rounded=rounded, cache=cache, runner=runner
            )
            return Planned(result.plan, result.details)
        calibrator = Calibrator(
            decoder, data, seed=options.seed, rounded=rounded, cache=cache, progress=progress, runner=runner
        )
        clock = plan_clock(decoder, data.heldout, calibrator.prompt, target=options.target, dtype=options.dtype)
        policies = all_policies(options.settings)
        result = choose(calibrator, origin, calibration, policies=policies, train=options.train, clock=clock)
    assert result.plan.calibration.auto is not None
    note(str(result.plan.calibration.auto.text))
    return Planned(result.plan, result.details)


def _quantised(
    calibrator: Calibrator,
    origin: dict[str, Any],
    calibration: CalibrationOptions,
    options: ExportOptions,
    progress: Callable[[str, int, int], None],
    note: Callable[[str], None],
) -> Planned:
    """A plan for quantised weights: of the form that was asked for, or of the fastest that keeps the budget."""
    decoder = calibrator.decoder
    matrices = find_matrices(decoder)
    names = tuple(reversed(FORMS)) if options.weights == AUTO_WEIGHTS else (str(options.weights),)
    stores: dict[str, QuantStore] = {}

    def view(form: WeightsForm) -> QuantisedView:
        told = partial(progress, f"quantising to {form.name}")
        stores[form.name] = make_store(decoder, matrices, form, calibrator.data.calibration, told)
        return QuantisedView(stores[form.name])

    candidates = []
    for form in (FORMS[name] for name in names):
        sizes = matrix_sizes(matrices, form)
        others = sum(sizes[kind]["bytes"] for kind in ("attention", "head") if kind in sizes)
        item = form.weight_bytes("ffn")
        candidates.append(FormCandidate(form.name, partial(view, form), form.to_dict(), item, sizes["ffn"]["bytes"], others))
    policy = get_policy(options.policy, options.settings)
    chosen, result = calibrate_forms(calibrator, policy, origin, calibration, candidates)
    warnings = []
    budget = calibration.budget
    if not calibration.keeps(result.drift):
        warnings.append(
            f"weights {chosen.name} alone cost {budget.told(result.drift)} on the held-out text, and the budget is {budget}; "
            "no neuron is skipped"
        )
    elif len(names) > 1:
        note(f"weights {chosen.name}")
    return Planned(result.plan, result.details, stores[chosen.name], tuple(warnings))


def store_again(
    plan: SparsityPlan,
    decoder: Decoder,
    data: CalibrationData,
    origin: str,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> QuantStore | None:
    """The quantised matrices that a plan was made with, made again; None if it was made for weights of a type.

    Raises:
        UsageError: a form of weights that this program does not have, or another text where codes depend on it.
    """
    form = WeightsForm.from_dict(plan.source.get("weights"), origin)
    if form is None:
        return None
    if form.rounding == COMPENSATED and plan.calibration.digest != data.digest:
        raise UsageError(
            f"{origin}: its weights ({form.name}) were quantised with the text {plan.calibration.text!r} in windows of "
            f"{plan.calibration.context} tokens, and the text here is another one; give the same --calibration-data and "
            "--calibration-context"
        )
    return make_store(decoder, find_matrices(decoder), form, data.calibration, partial(progress, f"quantising to {form.name}"))


def _runners(
    source: SourceModel,
    data: CalibrationData,
    options: ExportOptions,
    progress: Callable[[str, int, int], None],
    note: Callable[[str], None],
) -> AbstractContextManager[Runners]:
    """What runs the windows of a calibration: workers, which load the model as this process did, or this process."""
    names = ("token", "cache_dir", "local_files_only", "trust_remote_code", "allow_pickle")
    return calibrating(
        source,
        data,
        parse_pool(options.calibration_workers, options.calibration_threads, options.ray_address),
        threads=options.calibration_threads,
        dtype=options.dtype,
        target=options.target,
        hub={**{name: getattr(options, name) for name in names}, "import_experts": takes_experts(options.policy)},
        prompt=prompt_length(int(data.calibration.shape[1])),
        progress=progress,
        tell=note,
    )


def round_weights(target: Target, decoder: Decoder, dtype: str) -> None:
    """Put the weights on the grid of the engine's type, in place."""
    if dtype != "float32":
        target.round_weights(decoder, dtype)


def weights_again(
    plan: SparsityPlan, decoder: Decoder, data: CalibrationData, rounded: Callable[[], None], origin: str
) -> None:
    """Change the weights as a plan's were: the same pruning of the same text gives the same, and adapters are in the plan.

    Raises:
        UsageError: the text is another one, or adapters that do not fit the model.
    """
    made_with = (plan.calibration.pruning or {}).get("text_digest")
    if plan.prune is not None and made_with != data.digest:
        raise UsageError(
            f"{origin}: its weights were pruned ({plan.prune}) with the text {plan.calibration.text!r} in windows of "
            f"{data.calibration.shape[1]} tokens or others, and the text here is another one; give the same --calibration-data "
            "and --calibration-context"
        )
    pruning = None if plan.prune is None else WeightPruning.parse(plan.prune)
    FFNWeights(decoder, data.calibration, rounded).follow(pruning, plan.arrays)
