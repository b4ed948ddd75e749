"""`load_engine`: from an export folder to an engine, through the check of its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from clada_export.artifact.manifest import MANIFEST_NAME, Manifest, read_manifest
from clada_export.errors import BackendError, UsageError, shown
from clada_export.native.library import check_content, check_library, ort_cuda_library_path
from clada_export.runtime.engine import Engine
from clada_export.runtime.graph import Session
from graph_passes.op import DOMAIN, OP_TYPE, OP_VERSION

MOST_THREADS = 1024
"""ONNX Runtime makes all of them at once; a machine that had more cores than this would not use them for one operator."""

DEVICES = ("auto", "cpu", "cuda")
"""What `load_engine` takes for `device`; `clada_export.runtime.devices` says what becomes of it."""


@dataclass(frozen=True)
class Request:
    """How an export is to be opened: the arguments of `load_engine`."""

    threads: int | None = None
    library: Path | None = None
    use_library: bool = True
    verify_files: bool = True
    device: str = "auto"
    packed: bool = True


@dataclass(frozen=True)
class Library:
    """A native library: where it is loaded from, and the file that it is (for messages)."""

    path: Path
    name: Path


def load_engine(
    folder: Path | str,
    *,
    threads: int | None = None,
    library: Path | str | None = None,
    use_library: bool = True,
    verify_files: bool = True,
    device: str = "auto",
    packed: bool = True,
) -> Engine:
    """Load an export, for ONNX Runtime or TensorRT as it was compiled.

    Args:
        folder: what `clada-export` wrote.
        threads: threads of one operator; None takes one for each core that this process may use. ONNX Runtime only.
        library: a custom-op or plugin library to use instead of the export's own. It is loaded as it is.
        use_library: False runs the op's ONNX function body instead of the library: the same numbers, without the speed. ONNX
            Runtime only: whether a TensorRT engine needs the library was decided when it was built.
        verify_files: compare the sha256 of every file with the manifest first; large files that were compared before and have
            not changed since are not read again. The library is loaded from the bytes that were compared. False compares sizes
            only, and loads the library that is there.
        device: where ONNX Runtime runs the graph: `cpu`, `cuda` (an NVIDIA GPU), or `auto`: the GPU where its ONNX Runtime
            (`onnxruntime-gpu`) and the op's CUDA library are installed and `library` and `use_library` are left as they are,
            else the CPU. A TensorRT engine always runs on the GPU.
        packed: let ONNX Runtime keep packed copies of the matrices outside of the sparse layers: faster prompts and batches,
            for as much memory as those matrices take. False is for a machine that has not so much.

    Raises:
        UsageError: not an export, or a damaged one, or a wrong argument.
        BackendError: the library is missing or was built for another version of the op, or the backend can't load the engine,
            or the device can't be used; says what is missing.
    """
    folder = Path(folder)
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MOST_THREADS):
        raise UsageError(f"threads is {shown(threads)}; it must be a whole number from 1 to {MOST_THREADS}")
    if device not in DEVICES:
        raise UsageError(f"device is {shown(device)}; it must be one of {', '.join(DEVICES)}")
    manifest = read_manifest(folder, check_files=verify_files)
    found = (manifest.op["domain"], manifest.op["name"], manifest.op["version"])
    if found != (DOMAIN, OP_TYPE, OP_VERSION):
        raise BackendError(
            f"{folder / MANIFEST_NAME}: op: was exported with {found[0]}::{found[1]} version {found[2]}, and this program runs "
            f"{DOMAIN}::{OP_TYPE} version {OP_VERSION}; export again"
        )
    given = None if library is None else Path(library)
    request = Request(threads, given, use_library, verify_files, device, packed)
    return Engine(folder, manifest, OPENERS[manifest.target](folder, manifest, request))


def _ort_session(folder: Path, manifest: Manifest, request: Request) -> Session:
    try:
        from clada_export.runtime.devices import CPU, choose_device
        from clada_export.runtime.session import GraphSession
    except ImportError as error:
        raise BackendError(f"{folder}: this export needs ONNX Runtime: pip install 'clada-export[ort]'") from error
    own = request.use_library and request.library is None
    device = choose_device(request.device, own_library=own, for_cpu=_for_cpu(manifest))
    library = None
    if own and device != CPU:
        library = _cuda_library()
    elif request.use_library:
        library = _library(folder, manifest, request.library, request.verify_files)
    if library is None:
        return GraphSession(folder, manifest, None, request.threads, device=device, packed=request.packed)
    return GraphSession(
        folder, manifest, library.path, request.threads, library_name=library.name, device=device, packed=request.packed
    )


def _for_cpu(manifest: Manifest) -> str | None:
    """Why ONNX Runtime's CUDA provider has not all operators of a graph, or None."""
    if any(tensor.in_place is not None for tensor in manifest.cache):
        # com.microsoft::GroupQueryAttention in float32: the provider has it in 16 bits only.
        return "the attention of this engine is one node of ONNX Runtime's that runs on the CPU; export with --portable"
    if manifest.weights:
        return "weights of 4 to 8 bits are for the CPU; export with --weights float32 or float16, and --portable"
    return None


def _tensorrt_session(folder: Path, manifest: Manifest, request: Request) -> Session:
    from clada_export.runtime.tensorrt_session import open_session

    if request.threads is not None or not request.use_library:
        raise UsageError(f"{folder}: threads and use_library are of ONNX Runtime, and this is an export for TensorRT")
    if request.device == "cpu":
        raise UsageError(f"{folder}: device is 'cpu', and this is an export for TensorRT, which runs on a GPU")
    return open_session(folder, manifest, request.library, checked=request.verify_files)


OPENERS: Mapping[str, Callable[[Path, Manifest, Request], Session]] = {"ort": _ort_session, "trt": _tensorrt_session}
"""What opens the export of a target."""


def _cuda_library() -> Library:
    """The installed one: no export holds it. What is loaded is what was checked."""
    path = ort_cuda_library_path()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BackendError(f"library {path} can't be read: {error.strerror or error}") from error
    return Library(check_content(content, path), path)


def _library(folder: Path, manifest: Manifest, given: Path | None, checked: bool) -> Library | None:
    if given is None and manifest.library is not None and checked:
        name = folder / manifest.library
        return Library(check_content(manifest.listed(folder).read(manifest.library), name), name)
    if given is None and manifest.library is None:
        return None
    path = given if given is not None else folder / str(manifest.library)
    if not os.path.isfile(path):  # noqa: PTH113 - a name that is too long is no file either
        raise BackendError(f"{path}: the custom-op library is missing; copy the whole export, or install clada-export[ort]")
    check_library(path)
    return Library(path.resolve(), path)
