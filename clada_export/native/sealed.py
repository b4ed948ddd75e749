"""A library that is loaded from the bytes that were checked, and not from a file that may have been swapped since."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import tempfile
import threading
from pathlib import Path

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class _Copy:
    """Where a library lies that this process loads. It stays until the process ends: the dynamic loader knows libraries by
    their paths, and a path that is used again would give the one before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def path(self, content: bytes, name: str) -> Path:
        with self._lock:
            if self._path is None:
                self._path = self._in_memory(content, name) or self._in_private_folder(content, name)
            return self._path

    def _in_memory(self, content: bytes, name: str) -> Path | None:
        """A file in memory that nobody can change; None where the system does not load libraries from there."""
        open_files = []
        try:
            open_files.append(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            _write(open_files[-1], content)
            fcntl.fcntl(open_files[-1], fcntl.F_ADD_SEALS, _SEALS)
            # Somebody else may have loaded from a file of that number before and closed it.
            while _is_loaded(path := Path(f"/proc/self/fd/{open_files[-1]}")):
                open_files.append(os.dup(open_files[-1]))
            ctypes.CDLL(str(path))
        except OSError:
            for descriptor in open_files:
                os.close(descriptor)
            return None
        return path

    def _in_private_folder(self, content: bytes, name: str) -> Path:
        self._folder = tempfile.TemporaryDirectory(prefix="clada-")
        path = Path(self._folder.name) / name
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o500)
        try:
            _write(descriptor, content)
        finally:
            os.close(descriptor)
        return path


def sealed_copy(content: bytes, name: str) -> Path:
    """A path under which these bytes are loaded as a library, for as long as the process runs; one copy for each content.

    Args:
        name: a plain file name, for debuggers.

    Raises:
        OSError: neither memory nor the folder for temporary files holds it.
    """
    return _copy_of(hashlib.sha256(content).hexdigest()).path(content, name)


@functools.cache
def _copy_of(digest: str) -> _Copy:
    return _Copy()


def _is_loaded(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
