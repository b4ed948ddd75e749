"""What tests make once and share: between tests, files, the processes of a run, and runs.

`.cache/` at the root of the repository holds it. A key holds all that shapes a result, so that nothing there is ever out of
date; `rm -rf .cache` is always safe.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clada_export.native.library import ort_library_path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
PACKAGES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
"""Those whose version changes what an export writes."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made if it is missing, against all other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def kept(kind: str, key: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` filled; it is called only if no test made that folder before.

    Args:
        kind: of what is in it, and its parent folder's name.
        key: all that shapes what is in it.
        make: fills an empty folder. If it raises, nothing is kept.

    Returns:
        A folder to read. A test that changes something copies it first.
    """
    folder = CACHE / kind / digest(key)
    with locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def digest(key: str) -> str:
    """A short name for a long key."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


@functools.cache
def versions() -> str:
    """Of the packages that an export goes through."""
    return "\n".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


@functools.cache
def sources(*places: Path) -> str:
    """A digest of source files: names and bytes.

    Args:
        places: files and folders, from the root of the repository; of a folder, all but bytecode.
    """
    found = hashlib.sha256()
    for place in places:
        root = ROOT / place
        files = [root] if root.is_file() else [path for path in sorted(root.rglob("*")) if _is_source(path)]
        if not files:
            raise FileNotFoundError(f"{root}: no source files; what is kept for the tests depends on them")
        for path in files:
            found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()


def _is_source(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


@functools.cache
def compiler() -> str:
    """A digest of the compiler itself: both packages, the native library and the versions of what they build on."""
    library = hashlib.sha256(ort_library_path().read_bytes()).hexdigest()
    return "\n".join((versions(), sources(Path("clada_export"), Path("graph_passes")), library))
