"""`--target trt`: the rewritten graph in the engine's type, the plugin library, and engines of TensorRT or TensorRT-RTX.

The graph is plain ONNX (`fusions=None`) and strongly typed: traced in the type that the engine computes in. Its `SparseFFN`
nodes become plugin layers. Without a GPU the graph's numbers are checked through ONNX Runtime on the CPU, and those of the
engine are deferred: inputs and the eager model's outputs are saved for `clada verify`.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clada_export.artifact.manifest import Manifest, TensorSpec
from clada_export.artifact.profiles import Profile, make_profiles
from clada_export.decoder.decoder import Decoder
from clada_export.decoder.rounding import round_all_weights
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import BackendError, UsageError
from clada_export.files.json_files import read_json
from clada_export.native.library import TRT_LIBRARY_NAME, check_library, ort_library_path, trt_library_path
from clada_export.native.tensorrt import PLUGIN_VERSION, Backend, find_backend, missing_gpu
from clada_export.plan.targets import merging_refused
from clada_export.runtime import Engine, load_engine
from clada_export.runtime.tensorrt_session import engine_profiles, open_engine
from clada_export.targets.common import (
    MODEL_NAME,
    BuildRequest,
    BuiltModel,
    Subject,
    cache_tensors,
    ffn_rewrite,
    run_passes,
    save,
    tensor_spec,
)
from clada_export.targets.options import TensorRTOptions
from clada_export.targets.trt.build import PLUGIN_LAYER, BuiltEngines, build_engines, check_settings
from clada_export.targets.trt.commands import commands
from clada_export.targets.trt.inline import write_inlined
from clada_export.verify import Verification, VerifyOptions
from clada_export.verify import verify as run_checks
from clada_export.verify.precision import CONSTANTS_SHARE
from clada_export.verify.report import Check
from clada_export.verify.saved import check_saved, save_cases
from clada_export.verify.widened import write_widened
from graph_passes.attention_scale import ExactAttentionScale
from graph_passes.dead_columns import DropDeadColumns
from graph_passes.load_outputs import AddLoadOutputs
from graph_passes.machine_paths import ForgetMachinePaths
from graph_passes.op import DOMAIN, OP_TYPE
from graph_passes.pass_list import PassList
from graph_passes.rewrite import RewriteFFNs

FUSIONS: str | None = None
PACKAGES: tuple[str, ...] = ("onnxruntime", "polygraphy")
LAYERS_NAME = "engine-layers.json"
_PIP_NAMES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}


def require_backend(settings: TensorRTOptions | None = None, verify: bool = True) -> None:
    """Check that TensorRT, the plugin library and, to verify, ONNX Runtime with our library and Polygraphy are there.

    Raises:
        UsageError: settings out of range, or that this TensorRT does not have.
        BackendError: something is missing; says what to install.
    """
    settings = settings or TensorRTOptions()
    settings.check()
    check_settings(find_backend(), settings)
    if settings.plugin:
        _plugin_library()
    if not verify:
        return
    for module, package in (("onnxruntime", "clada-export[ort]"), ("polygraphy", "polygraphy")):
        if importlib.util.find_spec(module) is None:
            raise BackendError(
                f"verifying a TensorRT export needs {module}: pip install '{package}', or skip verification with --no-verify"
            )
    check_library(ort_library_path())


def round_weights(decoder: Decoder, dtype: str) -> str:
    """Round every parameter in place: the engine computes in `dtype` throughout."""
    return round_all_weights(decoder.module, dtype, decoder.used)


def traceable(decoder: TorchDecoder, dtype: str) -> TorchDecoder:
    """The decoder in the engine's type; a copy unless that is float32."""
    return decoder if dtype == "float32" else decoder.in_dtype(dtype)


def passes(rewrite: RewriteFFNs, scales: Collection[float]) -> PassList:
    """What is done to a traced graph, in this order.

    Args:
        scales: of the model's attention layers.
    """
    return PassList(
        rewrite,  # FFNs become SparseFFN nodes; `load` comes in, counts go out
        DropDeadColumns(),  # what packed projections held for those FFNs
        ExactAttentionScale(scales),  # in 16 bits the exporter rounds its root
        AddLoadOutputs(),  # what the load needs of the logits
        ForgetMachinePaths(),
    )


def build(request: BuildRequest) -> BuiltModel:
    """Rewrite the graph, write it, and build the engines.

    Raises:
        UnsupportedModelError: no FFN is in the graph, or TensorRT can't import it; names the node and the cause.
        UsageError: a layer of the plan has other sizes than the graph, or a profile is larger than the model.
        BackendError: TensorRT or the plugin library is missing, or the build fails.
    """
    refused = merging_refused("trt", request.plan.policy)
    if refused is not None and any(layer.merge is not None for layer in request.plan.layers):
        raise UsageError(refused)
    settings = request.settings or TensorRTOptions()
    backend = find_backend()
    warnings = check_settings(backend, settings)
    profiles = make_profiles(settings.max_batch, settings.max_sequence, settings.max_past, request.limit)
    rewrite = ffn_rewrite(request)
    report = run_passes(request, rewrite, passes(rewrite, request.scales))
    graph = request.traced.graph
    save(graph, request.out)
    inputs = tuple(tensor_spec(value) for value in graph.graph.inputs)
    plugin = None
    if settings.plugin:
        plugin = request.out / TRT_LIBRARY_NAME
        shutil.copyfile(_plugin_library(), plugin)
    with _graph_to_build(request.out, plugin) as model:
        engines = build_engines(backend, model, inputs, profiles, settings, plugin, request.out, request.progress)
    _write_layers(request.out, engines)
    made = sum(kind == PLUGIN_LAYER for _, kind in engines.layers)
    if plugin is not None and made != len(report.ffns):
        raise BackendError(
            f"{backend.title} made {made} plugin layers of {len(report.ffns)} {DOMAIN}::{OP_TYPE} nodes; the plugin must "
            f"have version {PLUGIN_VERSION} and namespace {DOMAIN!r}"
        )
    if plugin is None:
        warnings.append("built without the plugin (--no-plugin): every neuron is computed and masked, so no time is saved")
    return BuiltModel(
        MODEL_NAME,
        None if plugin is None else plugin.name,
        inputs,
        tuple(tensor_spec(value) for value in graph.graph.outputs),
        cache_tensors(graph),
        report,
        _record(backend, engines, profiles, inputs, settings, made, request),
        tuple(warnings),
    )


def _plugin_library() -> Path:
    try:
        library = trt_library_path()
    except BackendError as error:
        raise BackendError(f"{error}; or build without the plugin: --no-plugin") from error
    check_library(library)
    return library


@contextmanager
def _graph_to_build(out: Path, plugin: Path | None) -> Iterator[Path]:
    """The ONNX file that TensorRT parses: the export's own, or one without functions that is removed afterwards."""
    if plugin is not None:
        yield out / MODEL_NAME
        return
    inlined = out / f"inlined-{MODEL_NAME}"
    try:
        write_inlined(out / MODEL_NAME, inlined)
        yield inlined
    finally:
        inlined.unlink(missing_ok=True)


def _write_layers(out: Path, engines: BuiltEngines) -> None:
    layers = [{"name": name, "type": kind} for name, kind in engines.layers]
    (out / LAYERS_NAME).write_text(json.dumps(layers, indent=0) + "\n", encoding="utf-8")


def _record(
    backend: Backend,
    engines: BuiltEngines,
    profiles: tuple[Profile, ...],
    inputs: tuple[TensorSpec, ...],
    settings: TensorRTOptions,
    plugin_layers: int,
    request: BuildRequest,
) -> dict[str, Any]:
    """The manifest's field `engine`."""
    plugin = None
    if settings.plugin:
        plugin = {
            "name": OP_TYPE,
            "version": PLUGIN_VERSION,
            "namespace": DOMAIN,
            "file": TRT_LIBRARY_NAME,
            "embedded": settings.embed_plugin,
            "layers": plugin_layers,
        }
    record: dict[str, Any] = {
        "backend": backend.name,
        "version": backend.version,
        "package": _PIP_NAMES[backend.name],
        "files": [{"file": file.file, "compute_capabilities": list(file.compute_capabilities)} for file in engines.files],
        "profiles": [profile.to_dict() for profile in profiles],
        "plugin": plugin,
        "refit": settings.refit,
        "weight_streaming": settings.weight_streaming,
        "layers": LAYERS_NAME,
    }
    return {**record, "commands": commands(record, inputs, profiles)}


# --- verification ---


def verify(subject: Subject) -> Verification:
    """The graph's numbers through ONNX Runtime, the engine's make-up, and what is left for a machine with a GPU."""
    # 16-bit values are widened, so only the rounding of the graph's constants is allowed for.
    options = VerifyOptions(limits=subject.limits, computes_in=subject.manifest.dtype, rounding_share=CONSTANTS_SHARE)
    opened = partial(graph_engine, subject.folder, subject.manifest)
    result = run_checks(opened, subject.folder, subject.decoder, subject.text, options, subject.progress)
    result.checks = [replace(check, name=f"ONNX graph, {check.name}") for check in result.checks]
    result.checks += engine_checks(subject.folder, subject.manifest)
    subject.progress("inputs and outputs for a GPU")
    plan = subject.manifest.sparsity_plan(subject.folder)
    profiles = engine_profiles(subject.manifest)
    save_cases(subject.folder, subject.manifest, subject.decoder, plan, _tokens(subject), profiles)
    result.checks += _saved_checks_by_cpu(subject.folder, subject.manifest)
    if (reason := missing_gpu()) is None:
        result.checks += _saved_checks(subject.folder, subject.manifest)
    else:
        result.deferred.append(
            f"engine numerics: deferred, no GPU here ({reason}); run `clada verify` on this folder where the GPU is"
        )
    return result


def verify_saved(folder: Path, manifest: Manifest) -> Verification | None:
    """Hold the engine on this machine's GPU to the outputs saved at export.

    Raises:
        BackendError: no GPU, no TensorRT, another version; says what is missing.
    """
    return Verification([*engine_checks(folder, manifest), *_saved_checks(folder, manifest)])


def verify_deployed(subject: Subject) -> Verification:
    """All checks on the engine itself, against the source model. Needs a GPU, and raises as `verify_saved`."""
    options = VerifyOptions(limits=subject.limits, computes_in=subject.manifest.dtype)

    @contextmanager
    def opened() -> Iterator[Engine]:
        yield load_engine(subject.folder)

    result = run_checks(opened, subject.folder, subject.decoder, subject.text, options, subject.progress)
    result.checks += engine_checks(subject.folder, subject.manifest)
    return result


@contextmanager
def graph_engine(folder: Path, manifest: Manifest) -> Iterator[Engine]:
    """The export's ONNX file on ONNX Runtime with our CPU library; 16-bit types are widened to float32.

    Raises:
        BackendError: ONNX Runtime or the library is missing, or can't load the graph.
    """
    from clada_export.runtime.session import GraphSession

    library = ort_library_path()
    check_library(library)
    if manifest.dtype == "float32":
        yield Engine(folder, manifest, GraphSession(folder, manifest, library, None))
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_widened(folder / manifest.model, Path(scratch))
        widened = replace(manifest, cache=tuple(replace(tensor, dtype="float32") for tensor in manifest.cache))
        yield Engine(folder, widened, GraphSession(Path(scratch), widened, library, None))


def engine_checks(folder: Path, manifest: Manifest) -> list[Check]:
    """What can be told of an engine without a GPU: its size, and that every SparseFFN is a plugin layer."""
    record = manifest.engine or {}
    layers = read_json(folder / record["layers"])
    plugins = [layer["name"] for layer in layers if layer["type"] == PLUGIN_LAYER]
    sparse = len(manifest.plan["layers"])
    wanted = 0 if record["plugin"] is None else sparse
    why = "" if len(plugins) == wanted else f"{len(plugins)} plugin layers for {sparse} SparseFFN nodes; wanted {wanted}"
    numbers = {"layers": len(layers), "plugin_layers": len(plugins), "sparse_ffn_nodes": sparse}
    checks = [Check("engine, plugin layers", not why, numbers, {}, why)]
    for file in record["files"]:
        content = (folder / file["file"]).read_bytes()
        # An engine keeps the names of the plugins that it asks for.
        named = record["plugin"] is None or OP_TYPE.encode() in content
        faults = [text for text, bad in (("it is empty", not content), (f"it does not name {OP_TYPE}", not named)) if bad]
        numbers = {"bytes": len(content)}
        checks.append(Check(f"engine, file {file['file']}", not faults, numbers, {}, "; ".join(faults)))
    return checks


def _saved_checks_by_cpu(folder: Path, manifest: Manifest) -> list[Check]:
    """The saved inputs through the file as it is, by the op's function body: in its own type where the CPU has that."""
    if manifest.dtype == "bfloat16":
        return []
    import onnxruntime as ort

    session = ort.InferenceSession(str(folder / manifest.model), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]

    def infer(profile: int, feeds: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(names, session.run(names, feeds), strict=True))

    checks = check_saved(folder, infer)
    return [replace(check, name=f"ONNX graph in {manifest.dtype}, {check.name}") for check in checks]


def _saved_checks(folder: Path, manifest: Manifest) -> list[Check]:
    with ExitStack() as stack:
        runners: dict[int, Any] = {}

        def infer(profile: int, feeds: dict[str, Any]) -> dict[str, Any]:
            if profile not in runners:
                runners[profile] = stack.enter_context(_runner(folder, manifest, profile))
            return dict(runners[profile].infer(feeds))

        return [replace(check, name=f"engine on the GPU, {check.name}") for check in check_saved(folder, infer)]


def _runner(folder: Path, manifest: Manifest, profile: int) -> Any:
    """Polygraphy's runner of the engine with one of its profiles."""
    backend, engine = open_engine(folder, manifest)
    return polygraphy_runner(backend)(engine, name=backend.title, optimization_profile=profile)


def polygraphy_runner(backend: Backend) -> Any:
    """Polygraphy's `TrtRunner`, for this TensorRT.

    Raises:
        BackendError: Polygraphy is missing.
    """
    try:
        from polygraphy import config

        # What the environment variable POLYGRAPHY_USE_TENSORRT_RTX sets; its TensorRT part, imported next, looks at it.
        config.USE_TENSORRT_RTX = backend.is_rtx
        from polygraphy.backend.trt import TrtRunner
    except ImportError as error:
        raise BackendError("verifying a TensorRT export needs Polygraphy: pip install polygraphy") from error
    return TrtRunner


def _tokens(subject: Subject) -> list[int]:
    if subject.text is not None:
        return [int(token) for token in subject.text[0]]
    return [int(token) for token in np.random.default_rng(0).integers(0, subject.decoder.vocab_size, 64)]
