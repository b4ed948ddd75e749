"""A TensorRT session over an exported engine: two profiles, and a cache that stays on the GPU.

The graph reads the cache (`past`) and returns it longer (`present`), so it can't be extended in place. Every state therefore
has two buffers for each cache tensor, allocated once for the longest cache: a run reads one and writes the other, and the next
run swaps them. Only token ids, masks, loads and results cross the bus.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clada_export.artifact.manifest import CacheTensor, Manifest
from clada_export.artifact.profiles import Profile, choose_profile
from clada_export.errors import BackendError, UsageError
from clada_export.files.stamps import cache_home
from clada_export.foreign import ENGINE, reading
from clada_export.native.library import check_content
from clada_export.native.tensorrt import Backend, gpu_capability, load_backend, load_plugin, missing_gpu
from clada_export.runtime.cuda import CudaDevice, Device, host_array, to_float32
from clada_export.runtime.graph import ENTROPY, LOG_SUM_EXP, PassOutput

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "int64": 8, "int32": 4}
_FED_INPUTS = {"input_ids": "int64", "attention_mask": "int64", "position_ids": "int64", "load": "float32"}
_RESULTS = {
    "logits": ("float32", "float16", "bfloat16"),
    "active_neurons": ("int32",),
    LOG_SUM_EXP: ("float32",),
    ENTROPY: ("float32",),
}


class KVState:
    """The cache of one batch: for each tensor two buffers, and which of them holds the past.

    Args:
        capacity: tokens that a buffer has room for.
    """

    def __init__(self, device: Device, tensors: tuple[CacheTensor, ...], batch: int, capacity: int) -> None:
        self._device = device
        self._buffers: list[tuple[int, int]] = []
        self.batch = batch
        self.past = 0
        self.turn = 0
        for tensor in tensors:
            shape = cache_shape(tensor, batch, capacity)
            size = math.prod(shape) * ITEM_BYTES[tensor.dtype]
            first = device.allocate(size)
            self._buffers.append((first, 0))  # so that it is freed if there is no memory for the second
            self._buffers[-1] = (first, device.allocate(size))
            if not any(isinstance(axis, str) for axis in tensor.shape[1:]):  # a statistic: it starts at zero
                zeros = host_array(shape, tensor.dtype)
                zeros[...] = 0
                device.upload(first, zeros)
                device.synchronize()

    def addresses(self, index: int) -> tuple[int, int]:
        """(past, present) of cache tensor `index`."""
        pair = self._buffers[index]
        return pair[self.turn], pair[1 - self.turn]

    def advance(self, tokens: int) -> None:
        """What was written becomes the past."""
        self.past += tokens
        self.turn = 1 - self.turn

    def __del__(self) -> None:
        for pair in getattr(self, "_buffers", ()):
            for address in pair:
                if address:
                    self._device.free(address)


@dataclass(frozen=True)
class RuntimeCache:
    """Where TensorRT-RTX keeps the kernels that it compiled when it loaded an engine."""

    path: Path

    def read(self) -> bytes:
        """The file, or nothing if there is none or it can't be read."""
        try:
            return self.path.read_bytes()
        except OSError:
            return b""

    def write(self, content: bytes) -> None:
        """Replace the file. A cache that can't be written is only a slower start, so failure is silent."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(content)
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)


class TensorRTSession:
    """An engine with state; made by `open_session`.

    Args:
        engine: an `ICudaEngine`.
        cache: of compiled kernels, TensorRT-RTX only.

    Raises:
        UsageError: the engine does not have the inputs and outputs that the manifest names.
        BackendError: no execution context can be made.
    """

    def __init__(
        self, backend: Backend, engine: Any, manifest: Manifest, device: Device, cache: RuntimeCache | None = None
    ) -> None:
        self._backend = backend
        self._engine = engine
        self._device = device
        self._cache = cache
        self._tensors = manifest.cache
        self._profiles = engine_profiles(manifest)
        self.longest_run: int | None = max(profile.sequence[2] for profile in self._profiles)
        self.max_batch: int | None = max(profile.batch[2] for profile in self._profiles)
        self.max_tokens: int | None = max(profile.past[2] for profile in self._profiles) + 1
        self._capacity = max(profile.past[2] + profile.sequence[2] for profile in self._profiles)
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        listed = {spec.name for spec in (*manifest.inputs, *manifest.outputs)}
        if names != listed:
            raise UsageError(f"the engine's inputs and outputs differ from the manifest's: {', '.join(sorted(names ^ listed))}")
        past = {tensor.past for tensor in manifest.cache}
        _check_inputs(manifest, past)
        self._inputs = {spec.name: spec for spec in manifest.inputs if spec.name not in past}
        self._outputs = {spec.name: spec for spec in manifest.outputs if spec.name in _RESULTS}
        self._buffers: dict[str, tuple[int, int]] = {}
        self._contexts: dict[int, Any] = {}
        self._config: Any = None
        self._kernels: Any = None

    def empty_state(self, batch: int) -> KVState:
        """Buffers for `batch` sequences with no past.

        Raises:
            UsageError: more sequences than the engine takes.
            BackendError: the GPU is out of memory.
        """
        choose_profile(self._profiles, batch, 1, 0)
        return KVState(self._device, self._tensors, batch, self._capacity)

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], state: KVState) -> PassOutput:
        """Run the engine once; see `Session.run`."""
        batch, tokens = feeds["input_ids"].shape
        context = self._context(choose_profile(self._profiles, batch, tokens, state.past))
        kept = []  # until the copies are done
        for name, spec in self._inputs.items():
            array = np.ascontiguousarray(feeds[name], dtype=spec.dtype)
            kept.append(array)
            self._bind_input(context, name, array.shape, self._reserve(name, array.nbytes))
            self._device.upload(self._buffers[name][0], array)
        for index, tensor in enumerate(self._tensors):
            past, present = state.addresses(index)
            self._bind_input(context, tensor.past, cache_shape(tensor, batch, state.past), past)
            context.set_tensor_address(tensor.present, present)
        results = {name: self._bind_output(context, name) for name in self._outputs}
        if not context.execute_async_v3(self._device.stream):
            raise BackendError(f"{self._backend.title} fails to run the engine: {self._said()}")
        for name, array in results.items():
            self._device.download(array, self._buffers[name][0])
        self._device.synchronize()
        state.advance(tokens)
        logits = to_float32(results["logits"], self._outputs["logits"].dtype)
        return PassOutput(logits, results.get("active_neurons"), state, results.get(LOG_SUM_EXP), results.get(ENTROPY))

    def close(self) -> None:
        """Keep the compiled kernels and free the buffers."""
        self._keep_kernels()
        for address, _ in self._buffers.values():
            self._device.free(address)
        self._buffers.clear()

    def _bind_input(self, context: Any, name: str, shape: tuple[int, ...], address: int) -> None:
        if not context.set_input_shape(name, shape):
            raise BackendError(f"{self._backend.title} does not take shape {list(shape)} for {name!r}: {self._said()}")
        context.set_tensor_address(name, address)

    def _bind_output(self, context: Any, name: str) -> npt.NDArray[Any]:
        shape = tuple(int(axis) for axis in context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise BackendError(f"{self._backend.title} can't tell the shape of output {name!r}: {list(shape)}")
        array = host_array(shape, self._outputs[name].dtype)
        context.set_tensor_address(name, self._reserve(name, array.nbytes))
        return array

    def _reserve(self, name: str, size: int) -> int:
        """The address of a buffer of at least `size` bytes that stays with this tensor."""
        address, capacity = self._buffers.get(name, (0, -1))
        if capacity < size:
            if address:
                self._device.free(self._buffers.pop(name)[0])
            address = self._device.allocate(size)
            self._buffers[name] = (address, size)
        return address

    def _context(self, profile: int) -> Any:
        """The execution context of a profile. Making one compiles kernels in TensorRT-RTX, unless its cache has them."""
        if profile in self._contexts:
            return self._contexts[profile]
        if self._cache is not None and self._config is None:
            self._config = self._engine.create_runtime_config()
            self._kernels = self._config.create_runtime_cache()
            content = self._cache.read()
            if content:
                # Of another version, driver or GPU: it is refused, and the kernels are compiled anew.
                self._kernels.deserialize(content)
            self._config.set_runtime_cache(self._kernels)
        context = self._engine.create_execution_context(*(() if self._config is None else (self._config,)))
        if context is None:
            raise BackendError(
                f"{self._backend.title} can't make an execution context: {self._said()}; if the GPU is out of memory, export "
                "with a smaller --max-past or --max-sequence"
            )
        if not context.set_optimization_profile_async(profile, self._device.stream):
            raise BackendError(f"{self._backend.title} can't choose profile {profile}: {self._said()}")
        self._device.synchronize()
        self._contexts[profile] = context
        self._keep_kernels()
        return context

    def _keep_kernels(self) -> None:
        if self._cache is not None and self._kernels is not None:
            content = self._kernels.serialize()
            if content is not None:
                self._cache.write(bytes(content))

    def _said(self) -> str:
        return self._backend.messages.take() or "it gives no reason"


def open_session(folder: Path, manifest: Manifest, library: Path | None = None, *, checked: bool = True) -> TensorRTSession:
    """Load the engine of an export on this machine's GPU.

    Args:
        library: a plugin library to use instead of the export's own.
        checked: load what runs as native code, the export's library and engines that hold plugins, from bytes whose sha256 the
            manifest lists.

    Raises:
        BackendError: no GPU, no TensorRT or another version than the engine's, a plugin library that is missing, or an
            engine for another GPU; says what is missing.
        UsageError: the export has no engine, or what was to be checked has changed.
    """
    backend, engine = open_engine(folder, manifest, library, checked=checked)
    cache = None
    home = cache_home()
    if backend.is_rtx and home is not None:
        cache = RuntimeCache(home / f"{manifest.digest[:16]}-sm{gpu_capability()}.rtxcache")
    return TensorRTSession(backend, engine, manifest, CudaDevice(), cache)


def open_engine(folder: Path, manifest: Manifest, library: Path | None = None, *, checked: bool = True) -> tuple[Backend, Any]:
    """Deserialise the engine that is for this GPU; arguments and errors as `open_session`."""
    record = _record(folder, manifest)
    if (reason := missing_gpu()) is not None:
        raise BackendError(f"{folder}: a TensorRT engine runs on an NVIDIA GPU, and {reason}")
    backend = load_backend(record["backend"])
    # Major, minor and patch decide whether an engine can be read; a fourth number is the build.
    if backend.version.split(".")[:3] != record["version"].split(".")[:3]:
        raise BackendError(
            f"{folder}: the engine was built by {record['backend']} {record['version']}, and {backend.version} is installed; "
            f"pip install {record['package']}=={record['version']}, or export again"
        )
    file = engine_for(record, gpu_capability())
    runtime = backend.trt.Runtime(backend.logger)
    plugin = record["plugin"]
    listed = manifest.listed(folder)
    checked = checked and bool(manifest.files)  # one that is still being written lists none
    # An engine with its plugin in it is a library too.
    code = plugin is not None and plugin["embedded"]
    if code:
        runtime.engine_host_code_allowed = True
    elif plugin is not None:
        registry, name = runtime.get_plugin_registry(), folder / plugin["file"]
        if library is None and checked:
            load_plugin(backend, registry, check_content(listed.read(plugin["file"]), name), name)
        else:
            load_plugin(backend, registry, library or name)
    place = folder / file["file"]
    if checked and code:
        content = listed.read(file["file"])
    else:
        with reading(ENGINE, place):
            content = place.read_bytes()
    with reading(ENGINE, place):
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BackendError(
            f"{place}: {backend.title} can't load the engine on a GPU of compute capability {gpu_capability()} "
            f"(it is for {', '.join(file['compute_capabilities'])}): {backend.messages.take() or 'it gives no reason'}"
        )
    return backend, engine


def engine_for(record: Mapping[str, Any], capability: str | None) -> dict[str, Any]:
    """The engine file for a GPU. An engine for a list of GPUs also runs on later ones, so the choice is left to TensorRT then.

    Raises:
        BackendError: the export has one file for each GPU, and none for this one.
    """
    files: list[dict[str, Any]] = record["files"]
    for file in files:
        if capability in file["compute_capabilities"]:
            return file
    if len(files) == 1:
        return files[0]
    known = ", ".join(name for file in files for name in file["compute_capabilities"])
    raise BackendError(
        f"this GPU has compute capability {capability}, and the export has engines for {known}; export again with "
        f"--compute-capability {capability}"
    )


def engine_profiles(manifest: Manifest) -> tuple[Profile, ...]:
    """The profiles that the engine was built with, in its order."""
    return tuple(Profile.from_dict(value) for value in (manifest.engine or {})["profiles"])


def cache_shape(tensor: CacheTensor, batch: int, tokens: int) -> tuple[int, ...]:
    """The shape of a cache tensor that holds `tokens` tokens."""
    return (batch, *(tokens if isinstance(axis, str) else axis for axis in tensor.shape[1:]))


def _check_inputs(manifest: Manifest, past: set[str]) -> None:
    """Every input has to be one that is fed, in the type in which it is; the others have to be of the cache."""
    for spec in manifest.inputs:
        if spec.name not in past and _FED_INPUTS.get(spec.name) != spec.dtype:
            raise UsageError(f"the engine's input {spec.name!r} ({spec.dtype}) is none that this program feeds")
    for spec in manifest.outputs:
        if spec.name in _RESULTS and spec.dtype not in _RESULTS[spec.name]:
            wanted = " or ".join(_RESULTS[spec.name])
            raise UsageError(f"the engine's output {spec.name!r} is {spec.dtype}; {wanted} is wanted")
    if not {spec.name for spec in manifest.inputs} >= {"input_ids", *past}:
        raise UsageError("the engine has no input 'input_ids', or lacks one of the manifest's cache")
    if not {spec.name for spec in manifest.outputs} >= {"logits", *(tensor.present for tensor in manifest.cache)}:
        raise UsageError("the engine has no output 'logits', or lacks one of the manifest's cache")


def _record(folder: Path, manifest: Manifest) -> dict[str, Any]:
    if manifest.engine is None:
        raise UsageError(f"{folder}: the manifest names no TensorRT engine; export again with --target trt")
    return manifest.engine
