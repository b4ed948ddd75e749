"""Parse an ONNX file and build an engine, with TensorRT's failures as errors of ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clada_export.artifact.manifest import TensorSpec
from clada_export.artifact.profiles import Profile
from clada_export.errors import BackendError, UnsupportedModelError, UsageError
from clada_export.native.tensorrt import Backend, load_plugin, make_monitor, missing_gpu
from clada_export.targets.options import TensorRTOptions

PLUGIN_LAYER = "PLUGIN_V3"


@dataclass(frozen=True)
class EngineFile:
    """A written engine: its name in the folder, its bytes, and the GPUs it is for."""

    file: str
    bytes: int
    compute_capabilities: tuple[str, ...]


@dataclass(frozen=True)
class BuiltEngines:
    """The engine files, and the layers of the parsed network as (name, type)."""

    files: tuple[EngineFile, ...]
    layers: tuple[tuple[str, str], ...]


def check_settings(backend: Backend, settings: TensorRTOptions) -> list[str]:
    """Refuse what this TensorRT does not do.

    Returns:
        Warnings: options that have no effect with it.

    Raises:
        UsageError: a compute capability that it does not build for.
        BackendError: what needs a GPU, where there is none.
    """
    if not backend.is_rtx:
        return [] if settings.compute_capabilities == TensorRTOptions().compute_capabilities else [_classic_targets(backend)]
    known = {name: f"{name[2:-1]}.{name[-1]}" for name in backend.trt.ComputeCapability.__members__ if name.startswith("SM")}
    for capability in settings.compute_capabilities:
        if capability not in known.values():
            raise UsageError(
                f"--compute-capability {capability}: {backend.title} builds for {', '.join(known.values())} and no other; for "
                "other GPUs use classic TensorRT on a machine that has one"
            )
    if settings.refit and (reason := missing_gpu()) is not None:
        raise BackendError(
            f"--refit: {backend.title} compiles a refittable engine for the GPU at hand, and {reason}; build without "
            "--refit, or on a machine with a GPU"
        )
    if settings.timing_cache is not None:
        return [f"--timing-cache has no effect: {backend.title} times nothing when it builds"]
    return []


def _classic_targets(backend: Backend) -> str:
    return f"--compute-capability has no effect: {backend.title} builds for the GPU of this machine"


def build_engines(
    backend: Backend,
    model: Path,
    inputs: Sequence[TensorSpec],
    profiles: Sequence[Profile],
    settings: TensorRTOptions,
    plugin: Path | None,
    out: Path,
    step: Callable[[str, int, int], None],
) -> BuiltEngines:
    """Build the engine files into `out`: one, or with `refit` and TensorRT-RTX one for each compute capability.

    Args:
        plugin: the plugin library to register first; None builds what needs none.

    Raises:
        UnsupportedModelError: TensorRT can't import the graph; names the node and the cause.
        BackendError: the build failed.
    """
    groups = [settings.compute_capabilities]
    if backend.is_rtx and settings.refit:
        groups = [(capability,) for capability in settings.compute_capabilities]
    files = []
    layers: tuple[tuple[str, str], ...] = ()
    for group in groups:
        name = "model.engine" if len(groups) == 1 else f"model-sm{group[0].replace('.', '')}.engine"
        plan, layers = _build(backend, model, inputs, profiles, settings, plugin, group, step)
        (out / name).write_bytes(plan)
        files.append(EngineFile(name, len(plan), group))
    return BuiltEngines(tuple(files), layers)


def _build(
    backend: Backend,
    model: Path,
    inputs: Sequence[TensorSpec],
    profiles: Sequence[Profile],
    settings: TensorRTOptions,
    plugin: Path | None,
    capabilities: Sequence[str],
    step: Callable[[str, int, int], None],
) -> tuple[memoryview, tuple[tuple[str, str], ...]]:
    trt, messages = backend.trt, backend.messages
    messages.take()
    builder = trt.Builder(backend.logger)
    if plugin is not None:
        load_plugin(backend, builder.get_plugin_registry(), plugin)
    network = _parse(backend, builder, model)
    layers = tuple((network.get_layer(index).name, _type(network.get_layer(index))) for index in range(network.num_layers))
    config = _config(backend, builder, settings, plugin, capabilities)
    # Kept in a name: the configuration does not hold on to it.
    monitor = make_monitor(backend, step)
    config.progress_monitor = monitor
    for profile in profiles:
        config.add_optimization_profile(_profile(builder, profile, inputs))
    cache = _read_timing_cache(backend, config, settings.timing_cache)
    plan = builder.build_serialized_network(network, config)
    messages.raise_interrupt()
    if plan is None:
        raise BackendError(f"{model.name}: {backend.title} can't build an engine: {messages.take() or 'it gives no reason'}")
    if cache is not None and settings.timing_cache is not None:
        _write_atomically(settings.timing_cache, bytes(config.get_timing_cache().serialize()))
    return memoryview(plan), layers


def _parse(backend: Backend, builder: Any, model: Path) -> Any:
    trt, messages = backend.trt, backend.messages
    # Always strongly typed: the types of the ONNX file are the types of the engine (TensorRT 11 and RTX know nothing else).
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, backend.logger)
    parsed = parser.parse_from_file(str(model))
    messages.raise_interrupt()
    if not parsed:
        reasons = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        text = "; ".join(reasons[:3]) or messages.take() or "it gives no reason"
        raise UnsupportedModelError(f"{model.name}: {backend.title} can't import the graph: {text}")
    messages.take()
    on_host = [network.get_input(index).name for index in range(network.num_inputs) if network.get_input(index).is_shape_tensor]
    if on_host:
        # The runtime keeps every input on the GPU; this one would have to be read by the host.
        raise UnsupportedModelError(f"{model.name}: the graph computes shapes from the values of input {on_host[0]!r}")
    return network


def _parser_error(error: Any) -> str:
    where = " of ".join(part for part in (error.node_operator(), error.node_name() and repr(error.node_name())) if part)
    # The functions that the node is in, the innermost last: for a node of a function body, the layer it stands for.
    outer = [str(name) for name in (error.local_function_stack() or [])]
    inside = f" in {' in '.join(outer)}" if outer else ""
    cause = " ".join(str(error.desc()).split())
    return f"node {where}{inside}: {cause}" if where else cause


def _type(layer: Any) -> str:
    return str(layer.type).rpartition(".")[2]


def _config(backend: Backend, builder: Any, settings: TensorRTOptions, plugin: Path | None, capabilities: Sequence[str]) -> Any:
    trt = backend.trt
    config = builder.create_builder_config()
    # float32 means float32: TF32 keeps 10 bits of the mantissa, which no tolerance for float32 allows.
    config.clear_flag(trt.BuilderFlag.TF32)
    if settings.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if settings.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if settings.embed_plugin and plugin is not None:
        config.plugins_to_serialize = [str(plugin)]
    if backend.is_rtx:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), index)
    return config


def _profile(builder: Any, profile: Profile, inputs: Sequence[TensorSpec]) -> Any:
    made = builder.create_optimization_profile()
    for spec in inputs:
        made.set_shape(spec.name, *profile.shapes(spec))
    return made


def _read_timing_cache(backend: Backend, config: Any, path: Path | None) -> Any:
    if path is None or backend.is_rtx:
        return None
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise UsageError(f"--timing-cache {path}: can't be read: {error.strerror}") from error
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        # Made by another version or for another GPU: it is of no use here, and a new one takes its place.
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    backend.messages.take()
    return cache


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
