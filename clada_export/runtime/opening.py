"""`load_engine`: from an export folder to an engine, through the check of its files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from clada_export.artifact.manifest import MANIFEST_NAME, Manifest, read_manifest
from clada_export.errors import BackendError, UsageError, shown
from clada_export.native.library import check_content, check_library
from clada_export.runtime.engine import Engine
from clada_export.runtime.graph import Session
from graph_passes.op import DOMAIN, OP_TYPE, OP_VERSION

MOST_THREADS = 1024
"""ONNX Runtime makes all of them at once; a machine that had more cores than this would not use them for one operator."""


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

    Raises:
        UsageError: not an export, or a damaged one, or a wrong argument.
        BackendError: the library is missing or was built for another version of the op, or the backend can't load the engine.
    """
    folder = Path(folder)
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MOST_THREADS):
        raise UsageError(f"threads is {shown(threads)}; it must be a whole number from 1 to {MOST_THREADS}")
    manifest = read_manifest(folder, check_files=verify_files)
    found = (manifest.op["domain"], manifest.op["name"], manifest.op["version"])
    if found != (DOMAIN, OP_TYPE, OP_VERSION):
        raise BackendError(
            f"{folder / MANIFEST_NAME}: op: was exported with {found[0]}::{found[1]} version {found[2]}, and this program runs "
            f"{DOMAIN}::{OP_TYPE} version {OP_VERSION}; export again"
        )
    if manifest.target == "trt":
        if threads is not None or not use_library:
            raise UsageError(f"{folder}: threads and use_library are of ONNX Runtime, and this is an export for TensorRT")
        return Engine(folder, manifest, _tensorrt_session(folder, manifest, library, verify_files))
    opened = _library(folder, manifest, library, verify_files) if use_library else None
    return Engine(folder, manifest, _ort_session(folder, manifest, opened, threads))


def _ort_session(folder: Path, manifest: Manifest, library: Library | None, threads: int | None) -> Session:
    try:
        from clada_export.runtime.session import GraphSession
    except ImportError as error:
        raise BackendError(f"{folder}: this export needs ONNX Runtime: pip install 'clada-export[ort]'") from error
    if library is None:
        return GraphSession(folder, manifest, None, threads)
    return GraphSession(folder, manifest, library.path, threads, library_name=library.name)


def _tensorrt_session(folder: Path, manifest: Manifest, library: Path | str | None, checked: bool) -> Session:
    from clada_export.runtime.tensorrt_session import open_session

    return open_session(folder, manifest, None if library is None else Path(library), checked=checked)


def _library(folder: Path, manifest: Manifest, given: Path | str | None, checked: bool) -> Library | None:
    if given is None and manifest.library is not None and checked:
        name = folder / manifest.library
        return Library(check_content(manifest.listed(folder).read(manifest.library), name), name)
    if given is None and manifest.library is None:
        return None
    path = Path(given) if given is not None else folder / str(manifest.library)
    if not os.path.isfile(path):  # noqa: PTH113 - a name that is too long is no file either
        raise BackendError(f"{path}: the custom-op library is missing; copy the whole export, or install clada-export[ort]")
    check_library(path)
    return Library(path.resolve(), path)
