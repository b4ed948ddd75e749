"""Whether the files of an export are those that its manifest lists: where they are, their sizes and their sha256.

Large files are read once: what a hash was taken of is remembered by its stamp (`clada_export.files.stamps`), and only a file
that still has the very same one is not read again. Small files and libraries are read every time. Several large files are
hashed at once; one is bound by a core, as sha256 has one order in which it reads.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clada_export.errors import BackendError, UsageError
from clada_export.files.stamps import Known, Stamp, StampFile

LIBRARY_SUFFIXES = (".so", ".dll", ".dylib")
SMALL_BYTES = 1 << 20
"""A file below this is hashed every time: that takes less than a millisecond."""
_BLOCK = 1 << 20
"""Bytes of one read: they stay in a core's cache until they are hashed."""

Record = Mapping[str, Any]
"""The entry of a file in a manifest: `sha256` in hexadecimal digits, and `bytes`."""


def is_library(name: str) -> bool:
    """Whether a file is one that a program might load."""
    return Path(name).suffix in LIBRARY_SUFFIXES or ".so." in Path(name).name


class ListedFiles:
    """The files of a folder that a manifest lists.

    Args:
        folder: what was exported.
        files: the manifest's `files`; names are relative paths without `..`.
        library: the name of the custom-op library, or None; that it is missing is another error.

    Raises:
        UsageError: the folder can't be read.
    """

    def __init__(self, folder: Path, files: Mapping[str, Record], library: str | None = None) -> None:
        self.folder = folder
        self._files = files
        self._library = library
        try:
            self._place = Path(os.path.realpath(folder, strict=True))
        except OSError as error:
            raise UsageError(f"{folder}: can't be read: {error.strerror or error}") from error

    def check_sizes(self) -> None:
        """Check that every file is there, inside the folder, and as long as it should be.

        Raises:
            UsageError: one is not.
            BackendError: the library is missing.
        """
        for name in self._files:
            with self._open(name):
                pass

    def check_libraries(self) -> None:
        """Check that every library in the folder is listed.

        Raises:
            UsageError: one is not, or a folder can't be read.
        """
        pending = [""]
        while pending:
            inside = pending.pop()
            try:
                with os.scandir(self._place / inside) as entries:
                    for entry in entries:
                        name = f"{inside}{entry.name}"
                        if is_library(name) and name not in self._files:
                            raise UsageError(
                                f"{self.folder / name}: a library that the manifest does not list; remove it if you did not "
                                "put it there"
                            )
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(f"{name}/")
            except OSError as error:
                raise UsageError(f"{self.folder / inside}: can't be read: {error.strerror or error}") from error

    def check_hashes(self, digest: str) -> None:
        """Compare the sha256 of every file; of a large one that was hashed before, only its stamp.

        Args:
            digest: of the manifest, under which stamps are kept.

        Raises:
            UsageError: a file is missing, changed, or outside the folder.
            BackendError: the library is missing.
        """
        stamps = StampFile(str(self._place), digest)
        before = stamps.read()
        known: dict[str, Known] = {}
        unread = []
        for name, record in self._files.items():
            if record["bytes"] < SMALL_BYTES or is_library(name):
                self.read(name)
                continue
            with self._open(name) as stream:
                stamp = Stamp.of(os.fstat(stream.fileno()))
            if before.get(name) == Known(record["sha256"], stamp):
                known[name] = before[name]
            else:
                unread.append(name)
        for name, lasting in self._hash_all(unread).items():
            if lasting is not None:
                known[name] = Known(self._files[name]["sha256"], lasting)
        if known != before:
            stamps.write(known)

    def read(self, name: str) -> bytes:
        """The content of a file, checked: whoever uses these bytes uses what the manifest lists, whatever happens to the file.

        Raises:
            UsageError, BackendError: as `check_hashes`.
        """
        try:
            with self._open(name) as stream:
                # A file may grow after its size was compared.
                content = stream.read(self._files[name]["bytes"] + 1)
        except OSError as error:
            raise self._unreadable(name, error) from error
        self._compare(name, hashlib.sha256(content).hexdigest())
        return content

    def _hash_all(self, names: list[str]) -> dict[str, Stamp | None]:
        """Hash files side by side, the largest first; what `_hash` gives for each."""
        if not names:
            return {}
        stop = threading.Event()
        ordered = sorted(names, key=lambda name: -int(self._files[name]["bytes"]))
        with ThreadPoolExecutor(min(len(names), len(os.sched_getaffinity(0)))) as pool:
            try:
                runs = {name: pool.submit(self._hash, name, stop) for name in ordered}
                wait(runs.values(), return_when=FIRST_EXCEPTION)
            finally:
                stop.set()  # an error or Ctrl-C: the others need not go on
            return {name: run.result() for name, run in runs.items()}

    def _hash(self, name: str, stop: threading.Event) -> Stamp | None:
        """Compare a file's sha256.

        Returns:
            The stamp of what was hashed, if a later change to it would show; None if not, or if `stop` was set.
        """
        now = time.time_ns()
        digest = hashlib.sha256()
        length = 0
        try:
            with self._open(name) as stream:
                stamp = Stamp.of(os.fstat(stream.fileno()))
                buffer = memoryview(bytearray(_BLOCK))
                while (count := stream.readinto(buffer)) and length <= stamp.size:
                    if stop.is_set():
                        return None
                    digest.update(buffer[:count])
                    length += count
                unchanged = Stamp.of(os.fstat(stream.fileno())) == stamp
        except OSError as error:
            raise self._unreadable(name, error) from error
        self._compare(name, digest.hexdigest())
        return stamp if unchanged and stamp.settled(now) else None

    def _compare(self, name: str, found: str) -> None:
        wanted = self._files[name]["sha256"]
        if found != wanted:
            raise UsageError(
                f"{self.folder / name}: changed after the export: its sha256 is {found[:16]}..., and the manifest has "
                f"{wanted[:16]}...; copy the whole folder again, or export again"
            )

    @contextmanager
    def _open(self, name: str) -> Iterator[io.BufferedReader]:
        """A listed file, open, where and as long as it should be."""
        path = self.folder / name
        try:
            # Links are followed here and not by `open`, so that what is opened is what was looked at.
            place = Path(os.path.realpath(self._place / name, strict=True))
            if not place.is_relative_to(self._place):
                raise UsageError(
                    f"{path}: a link that leads out of the folder; copy the folder with its links resolved (cp -rL) and use "
                    "the copy"
                )
            if not stat.S_ISREG(place.lstat().st_mode):
                raise UsageError(f"{path}: not a regular file")
            descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            remedy = "copy the whole folder or export again"
            if name == self._library:
                raise BackendError(f"{path}: the custom-op library is missing; {remedy}") from error
            raise UsageError(f"{path}: the manifest lists this file, and it is missing; {remedy}") from error
        except OSError as error:
            raise self._unreadable(name, error) from error
        with os.fdopen(descriptor, "rb") as stream:
            found, wanted = os.fstat(descriptor), self._files[name]["bytes"]
            if not stat.S_ISREG(found.st_mode):
                raise UsageError(f"{path}: not a regular file")
            if found.st_size != wanted:
                raise UsageError(f"{path}: has {found.st_size} bytes, and the manifest says {wanted}; copy it or export again")
            yield stream

    def _unreadable(self, name: str, error: OSError) -> UsageError:
        return UsageError(f"{self.folder / name}: can't be read: {error.strerror or error}")
