"""The compiler: source, calibrate, trace, graph passes, target, verify, artifact, in this order."""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clada_export import __version__
from clada_export.artifact.manifest import Manifest, read_manifest
from clada_export.artifact.model_card import write_model_card
from clada_export.artifact.report import write_report
from clada_export.artifact.versions import installed_versions, required_packages, untested_versions
from clada_export.artifact.writer import ArtifactWriter
from clada_export.calibration import CalibrationData, load_calibration_data
from clada_export.decoder.padding_kinds import NONE
from clada_export.decoder.torch_decoder import require_torch
from clada_export.errors import UsageError, VerificationError
from clada_export.export_options import ExportOptions, quantises
from clada_export.methods.imported import check_import, ignored_options, require_dense, require_whole, takes_experts
from clada_export.plan.fit import require_fit
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.targets import TARGET_TRAITS
from clada_export.plan.weights_form import WeightsForm
from clada_export.planning import (
    Planned,
    calibration_context,
    check_goals,
    check_plan_weights,
    make_plan,
    read_data,
    round_weights,
    weights_again,
)
from clada_export.price.room import require_room
from clada_export.progress import Progress, Stages
from clada_export.quantise.store import QuantStore
from clada_export.source.companions import write_companions
from clada_export.source.load import SourceModel, load_source
from clada_export.source.onnx.graph import load_graph
from clada_export.targets.common import BuildRequest, BuiltModel, Subject, Target
from clada_export.targets.registry import TARGETS
from clada_export.trace.trace import TracedModel, trace
from clada_export.verify import QuantisedWeights, Verification
from graph_passes.op import DOMAIN, OP_TYPE, OP_VERSION

IMPORTED_KL = 0.01
"""Nats a token: the engine of an imported mixture computes that mixture; what is left is rounding, and experts that tie."""
PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")


@dataclass(frozen=True)
class ExportResult:
    """Where the engine is, and what is known about it."""

    path: Path
    manifest: Manifest
    plan: SparsityPlan
    verification: Verification | None
    timings: dict[str, float] = field(default_factory=dict)


def export(
    model: str | Path,
    output: str | Path,
    options: ExportOptions | None = None,
    *,
    progress: Progress | None = None,
    **overrides: Any,
) -> ExportResult:
    """Compile a decoder into an engine folder.

    Args:
        model: a Hub id, a local folder, or a `.gguf` file.
        output: the folder to make.
        options: all options at once; `overrides` set single ones (`budget="kl=0.05"`).

    Raises:
        UsageError, UnsupportedModelError, VerificationError, BackendError: see `clada_export.errors`. Nothing is left behind.
    """
    options = replace(options or ExportOptions(), **overrides)
    given = None
    if options.plan is None:
        options = options.settled()
        options.check()
    else:
        options.check()
        given = SparsityPlan.load_file(options.plan)
        check_goals(given, str(options.plan), options.target)
        options = check_plan_weights(given, options).settled()
        options.check()
    stages = Stages(progress)
    target = TARGETS[options.target]
    target.require_backend(options.tensorrt, options.verify)
    policy = options.policy if given is None else given.policy
    with ArtifactWriter(Path(output), options.overwrite) as writer:
        with stages("source") as note:
            source = _load(str(model), options, policy)
            ffns = require_dense(source.decoder, source.name, policy, options.prune)
            note(f"{source.name}, {len(ffns)} FFNs, {source.source_dtype}")
            _check_graph_source(source, options, given)
            check_import(source.decoder, source.name, policy, options.prune)
            if (short := require_room(source, Path(output), options, given)) is not None:
                note(short)
        warnings = [*source.warnings, *(f"{item.name} is left dense: {item.reason}" for item in source.decoder.skipped)]
        warnings += ignored_options(source.decoder, options.budget, ExportOptions.budget, options.sparsity, options.settings)
        if options.dtype != "float32":
            with stages("round"):
                warnings.append(target.round_weights(source.decoder, options.dtype))
        data = read_data(source, options)
        warnings += data.warnings
        with stages("calibrate") as note:
            planned = make_plan(source, data, given, options, target, stages.inner, note)
            plan, store = planned.plan, planned.store
            warnings += planned.warnings
            note(f"{plan.expected_sparsity:.1%} of neurons skipped at load 0")
        with stages("trace" if source.graph is None else "read graph") as note:
            traced = _traced(source, target, options.dtype)
            if traced.way is not None:
                note(traced.way.told())
        with stages("rewrite and write") as note:
            built = target.build(_build_request(source, traced, planned, writer.path, options, stages))
            del traced
            note(f"matched {len({item.name for item in built.report.ffns})}/{len(ffns)} FFNs")
        warnings += _untested(target, built)
        warnings += [*built.warnings, *(f"{miss.name} is left dense: {miss.reason}" for miss in built.report.misses)]
        # What the graph does not have can't be checked or reported as sparse.
        rewritten = {item.name for item in built.report.ffns}
        require_whole(source.decoder, rewritten)
        plan = plan.with_layers(tuple(layer for layer in plan.layers if layer.name in rewritten))
        write_companions(source.decoder, source.tokenizer, writer.path, source.name)
        plan.save_arrays(writer.path)
        manifest = _manifest(source, plan, built, target, options, warnings)
        if store is not None:
            manifest = replace(manifest, weights={"form": store.weights.name, **store.sizes()})
        if manifest.padding == NONE:
            one_length = "the model does not take padding: prompts of a batch have to be of one length"
            manifest = replace(manifest, warnings=(*manifest.warnings, one_length))
        writer.draft(manifest)
        verification: Verification | None = None
        if options.verify:
            with stages("verify") as note:
                verification = target.verify(_subject(writer.path, manifest, source, data, stages, store))
                note(f"{sum(check.passed for check in verification.checks)}/{len(verification.checks)} checks")
            if not verification.passed:
                raise VerificationError("verification failed:\n  " + "\n  ".join(verification.failures()))
            found = verification.to_dict()
            warned = (*manifest.warnings, *verification.deferred)
            manifest = replace(manifest, verification=found, drift=verification.drift, warnings=warned)
        else:
            manifest = replace(manifest, warnings=(*manifest.warnings, "not verified (--no-verify)"))
        report = {
            "model": source.name,
            "plan": plan.to_dict(),
            "verification": verification.to_dict() if verification else {},
            "rewrite": built.report.to_dict(),
            "quantised": built.products.to_dict() if built.products is not None else {},
            "engine": built.engine or {},
            "calibration": planned.details,
            "warnings": list(manifest.warnings),
        }
        write_report(writer.path, report)
        write_model_card(writer.path, manifest)
        manifest = writer.commit(manifest)
    return ExportResult(Path(output), manifest, plan, verification, stages.seconds)


def verify_folder(
    folder: str | Path,
    source: str | None = None,
    *,
    calibration_data: Path | None = None,
    progress: Progress | None = None,
    **source_options: Any,
) -> Verification:
    """Verify an engine folder again: against its source model, or, where the export keeps some, against saved outputs.

    Args:
        folder: what `export` wrote.
        source: where the source model is; by default the Hub id in the manifest, if nothing was saved.
        calibration_data: the text that the export was calibrated with; needed again only if its weights were pruned.
        source_options: of `clada_export.source.load.load_source`.

    Raises:
        UsageError: the source can't be found, or is another model than the one that was exported.
        BackendError: what runs the engine is missing.
    """
    stages = Stages(progress)
    manifest = read_manifest(folder)
    target = TARGETS[manifest.target]
    if source is None and (found := target.verify_saved(Path(folder), manifest)) is not None:
        return found
    recorded = manifest.source
    place = source or (recorded["name"] if recorded["kind"] == "hub" else None)
    if place is None:
        raise UsageError(
            f"{folder} was exported from a local {recorded['kind']} called {recorded['name']!r}; say where it is with --source"
        )
    plan = manifest.sparsity_plan(Path(folder))
    check_goals(plan, str(folder), manifest.target)
    with stages("source"):
        experts = takes_experts(plan.policy)
        loaded = load_source(place, **{"revision": recorded["revision"], "import_experts": experts, **source_options})
        if loaded.weights_digest != recorded["weights_digest"]:
            raise UsageError(
                f"{place} is not the model that {folder} was exported from: its weights have digest "
                f"{loaded.weights_digest[:16]}..., and the manifest says {recorded['weights_digest'][:16]}..."
            )
        require_fit(plan, loaded.decoder.require_ffns(), recorded["weights_digest"], str(folder))
        if manifest.dtype != "float32":
            target.round_weights(loaded.decoder, manifest.dtype)
    context = calibration_context(loaded, plan.calibration.context or ExportOptions.calibration_context)
    data = load_calibration_data(loaded.tokenizer, loaded.decoder.vocab_size, text_file=calibration_data, context=context)
    weights_again(plan, loaded.decoder, data, partial(round_weights, target, loaded.decoder, manifest.dtype), str(folder))
    with stages("verify"):
        return target.verify_deployed(_subject(Path(folder), manifest, loaded, data, stages))


def _load(model: str, options: ExportOptions, policy: str) -> SourceModel:
    return load_source(
        model,
        revision=options.revision,
        token=options.token,
        cache_dir=options.cache_dir,
        local_files_only=options.local_files_only,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
        import_experts=takes_experts(policy),
        dtype=torch.float32,
    )


def _check_graph_source(source: SourceModel, options: ExportOptions, given: SparsityPlan | None) -> None:
    """Refuse what a graph can't be exported with: its weights are taken from its file as they are."""
    if source.graph is None:
        return
    where = f"{source.graph} is an ONNX graph"
    if not TARGET_TRAITS[options.target].compiles_graphs:
        raise UsageError(f"{where}, and --target {options.target} compiles the PyTorch model; give that, or --target ort")
    pruned = options.prune or (given.prune if given is not None else None)
    if pruned:
        raise UsageError(f"{where}; weights are pruned ({pruned}) in the PyTorch model only")
    if options.weights is not None and quantises(options.weights):
        raise UsageError(f"{where}; --weights {options.weights} needs the PyTorch model, so give that")
    if options.settings.finetune or (given is not None and any(layer.adapter_rank is not None for layer in given.layers)):
        raise UsageError(f"{where}; --finetune needs gradients, so it needs the PyTorch model")


def _traced(source: SourceModel, target: Target, dtype: str) -> TracedModel:
    if source.graph is not None:
        return TracedModel(load_graph(source.graph), None)
    decoder = require_torch(source.decoder, "tracing")
    return trace(target.traceable(decoder, dtype), fusions=target.FUSIONS)


def _build_request(
    source: SourceModel, traced: TracedModel, planned: Planned, folder: Path, options: ExportOptions, stages: Stages
) -> BuildRequest:
    return BuildRequest(
        traced,
        planned.plan,
        folder,
        quantiser=planned.store,
        dtype=options.dtype,
        limit=source.decoder.sequence_limit,
        scales=source.decoder.attention_scales,
        settings=options.tensorrt,
        portable=options.portable,
        progress=stages.inner,
    )


def _manifest(
    source: SourceModel,
    plan: SparsityPlan,
    built: BuiltModel,
    target: Target,
    options: ExportOptions,
    warnings: list[str],
) -> Manifest:
    return Manifest(
        tool_version=__version__,
        source=source.record(),
        target=options.target,
        op={"domain": DOMAIN, "name": OP_TYPE, "version": OP_VERSION},
        plan=plan.to_dict(),
        load_signal=plan.load,
        inputs=built.inputs,
        outputs=built.outputs,
        dtype=options.dtype,
        cache=built.cache,
        versions={"python": platform.python_version(), **installed_versions((*PACKAGES, *target.PACKAGES))},
        library=built.library,
        engine=built.engine,
        model=built.model,
        warnings=tuple(warnings),
        tokenizer=source.tokenizer is not None,
        padding=source.decoder.padding,
        first_position=source.decoder.first_position,
        ffn_runs={name: count for name, count in Counter(item.name for item in built.report.ffns).items() if count > 1},
    )


def _untested(target: Target, built: BuiltModel) -> list[str]:
    """What to say of packages in versions that were not tested; TensorRT's name is known by what it built."""
    engine = (built.engine["package"],) if built.engine else ()
    return untested_versions(installed_versions((*required_packages(), *target.PACKAGES, *engine)))


def _subject(
    folder: Path,
    manifest: Manifest,
    source: SourceModel,
    data: CalibrationData,
    stages: Stages,
    store: QuantStore | None = None,
) -> Subject:
    text = None if data.origin == "random tokens" else data.heldout.numpy().astype(np.int64)
    limits = _limits(manifest.sparsity_plan())
    form = WeightsForm.from_dict(manifest.plan["source"].get("weights"), str(folder))
    weights = None if form is None else QuantisedWeights(form, store)
    return Subject(folder, manifest, source.decoder, text, limits, lambda what: stages.inner(what, 0, 0), weights)


def _over(plan: SparsityPlan) -> bool:
    """Whether quantised weights alone were over the budget when they were calibrated, as the manifest warns."""
    drift, limits = plan.calibration.drift, plan.calibration.goal.drift_limits if plan.calibration.goal is not None else {}
    if plan.source.get("weights") is None or plan.expected_sparsity > 0.0 or drift is None:
        return False
    return any((value := drift.get(f"{name}_bound")) is None or value > limit for name, limit in limits.items())


def _limits(plan: SparsityPlan) -> dict[str, float]:
    """The drift that the plan's budget allows; none for a plan by sparsity."""
    # Calibration held the tuned sparse model to the budget, against the model as it was given. Here it is compared with its own
    # dense side, which fine-tuning was free to move.
    if any(layer.adapter_rank is not None for layer in plan.layers):
        return {}
    goal = plan.calibration.goal
    if goal is None:
        return {}
    if goal.imported:
        # In 16 bits a router's two best can change places, which is no small change of a token.
        return {"kl": IMPORTED_KL} if plan.source.get("dtype") == "float32" else {}
    if goal.budget is not None and _over(plan):
        return {}
    return goal.drift_limits
