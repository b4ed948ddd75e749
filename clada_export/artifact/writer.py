"""`ArtifactWriter`: the output folder appears whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from clada_export.artifact.manifest import MANIFEST_NAME, Manifest, file_record, write_manifest
from clada_export.errors import CladaError, UsageError
from clada_export.files.json_files import read_json
from clada_export.files.stamps import Stamp
from clada_export.files.work_folder import WorkFolder, abandoned_work_folders
from clada_export.foreign import DISK_FULL

_DISK_FAULTS = (errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
"""Of a `write`, which does not say which file it was."""
_DISK_FULL_TEXT = ("No space left on device", "os error 28", "Disk quota exceeded")
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
_PROBE_BYTES = 256 << 10
_NAMES_SHOWN = 3
TICK_NS = 100_000_000
"""A file that changed less than this before it was hashed may change again without showing it: times of files come in ticks."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ArtifactWriter:
    """Writes an export into a temporary folder beside `out`, and renames it into place when it is complete.

    Use it as a context manager; put files under `path`, then call `commit`. Leaving the block in any other way, Ctrl-C and
    SIGTERM included, removes everything that was written. What a killed (SIGKILL) run left is removed by the next one.

    Args:
        out: the folder to make. Its parent must exist.
        overwrite: replace `out` if it is an earlier export, with nothing else in it, or an empty folder.

    Raises:
        UsageError: on entry, when `out` can't be made; on leaving, when the disk is full or a file can't be written.
    """

    def __init__(self, out: Path, overwrite: bool = False) -> None:
        # Not resolve(): whether `out` itself is a link matters.
        self.out = Path(os.path.abspath(out))  # noqa: PTH100
        self.overwrite = overwrite
        self._work: WorkFolder | None = None
        self._previous_handler: Any = None
        self._hashed: dict[str, tuple[Stamp, dict[str, Any]]] = {}

    @property
    def path(self) -> Path:
        """The temporary folder to write into.

        Raises:
            RuntimeError: outside the `with` block.
        """
        if self._work is None:
            raise RuntimeError("ArtifactWriter.path is there only inside the with block")
        return self._work.new

    def __enter__(self) -> Self:
        try:
            with _signals_held():
                self._check_parent()
                self._recover()
                self._check_target()
                self._work = self._make_work_folder()
                self._catch_sigterm()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with _signals_held():
            # Before the clean-up, which makes room again.
            failure = None if error is None else self._failure(error)
            self._clean()
        if failure is not None:
            raise failure from error

    def draft(self, manifest: Manifest) -> None:
        """Write the manifest for what the temporary folder holds so far, so that an engine can be loaded from it.

        Raises:
            UsageError: the manifest is not valid.
        """
        write_manifest(self.path, manifest.with_files(self._records(self.path)))

    def commit(self, manifest: Manifest) -> Manifest:
        """Record every file, write the manifest last, and put the folder in place.

        Args:
            manifest: the manifest; its `files` are replaced by what the folder holds.

        Returns:
            The manifest as written.

        Raises:
            UsageError: the manifest is not valid, or the folder can't be put in place.
        """
        complete = manifest.with_files(self._records(self.path))
        write_manifest(self.path, complete)
        with _signals_held():
            try:
                self._put_in_place()
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise
                raise UsageError(f"{self.out}: the finished export can't be put in place: {error.strerror or error}") from error
        return complete

    def _records(self, folder: Path) -> dict[str, dict[str, Any]]:
        """The entry of every file; one that is as it was when it was hashed is not read again: weights are gigabytes."""
        records = {}
        for name, path in _files(folder):
            stamp, now = Stamp.of(path.stat()), time.time_ns()
            known = self._hashed.get(name)
            if known is not None and known[0] == stamp:
                records[name] = known[1]
                continue
            records[name] = file_record(path)
            if now - max(stamp.modified, stamp.changed) > TICK_NS:
                self._hashed[name] = stamp, records[name]
        return records

    def _put_in_place(self) -> None:
        assert self._work is not None
        moved = False
        if self.overwrite and self.out.exists():
            self._check_target()
            self.out.rename(self._work.old)
            moved = True
        try:
            if self.out.exists():
                raise FileExistsError(errno.EEXIST, "it was made by someone else in the meantime", str(self.out))
            self._work.new.rename(self.out)
        except OSError:
            if moved:
                self._work.old.rename(self.out)
            raise

    def _check_parent(self) -> None:
        parent = self.out.parent
        if not parent.is_dir():
            raise UsageError(f"{self.out}: the parent folder {parent} does not exist; make it first")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"{self.out}: the parent folder {parent} can't be written to")

    def _check_target(self) -> None:
        out = self.out
        if not os.path.lexists(out):
            return
        if out.is_symlink() or not out.is_dir():
            raise UsageError(f"{out}: exists and is not a folder; choose another output folder")
        if not self.overwrite:
            raise UsageError(f"{out}: exists already; choose another output folder, or replace it with --overwrite")
        try:
            if any(out.iterdir()):
                _check_export(out)
        except OSError as error:
            raise UsageError(f"{out}: can't be looked at: {error.strerror or error}") from error

    def _make_work_folder(self) -> WorkFolder:
        try:
            return WorkFolder.make(self.out)
        except OSError as error:
            raise UsageError(f"{self.out}: a folder can't be made in {self.out.parent}: {error.strerror or error}") from error

    def _recover(self) -> None:
        """Remove what killed runs left; put back a folder that was moved aside and never replaced."""
        for work in abandoned_work_folders(self.out):
            if work.old.is_dir() and not os.path.lexists(self.out):
                work.old.rename(self.out)
            work.remove()

    def _failure(self, error: BaseException) -> UsageError | None:
        """What to say of an error that is the disk's fault; None for every other."""
        if isinstance(error, CladaError) or not isinstance(error, Exception):
            return None
        nothing_left = "Nothing was left behind"
        if _says_disk_full(error) or self._is_full():
            place = self.out.parent
            # What is written elsewhere meanwhile (temporary files, say) can fill another disk.
            name = error.filename if isinstance(error, OSError) else None
            if isinstance(name, str | bytes) and self._work is not None and not self._work.holds(name):
                place = Path(os.fsdecode(name)).parent
            free = shutil.disk_usage(place).free if place.is_dir() else 0
            return UsageError(
                f"{self.out}: the disk is full: {free} bytes were free in {place} when writing failed; "
                f"free some space or choose another folder. {nothing_left}"
            )
        if not isinstance(error, OSError) or self._work is None:
            return None
        if self._work.holds(error.filename):
            name = Path(os.fsdecode(error.filename)).name
            return UsageError(f"{self.out}: {name} can't be written: {error.strerror or error}. {nothing_left}")
        if error.errno in _DISK_FAULTS:
            return UsageError(f"{self.out}: writing failed: {error.strerror or error}. {nothing_left}")
        return None

    def _is_full(self) -> bool:
        """Whether nothing more can be written. Some writers fail on a full disk without saying so."""
        if self._work is None:
            return False
        probe = self._work.path / "probe"
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))
        except OSError as error:
            return error.errno in DISK_FULL
        finally:
            probe.unlink(missing_ok=True)
        return False

    def _clean(self) -> None:
        if self._work is not None:
            self._work.remove()
            self._work = None
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None

    def _catch_sigterm(self) -> None:
        # Python allows handlers only in the main thread; elsewhere the program decides what SIGTERM does.
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, _interrupt) or signal.SIG_DFL


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is done, so that clean-up and renames are not cut in half."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _says_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    # Native writers (safetensors, protobuf) report it as text in exceptions of their own; NumPy says how much it could write.
    return any(text in str(error) for text in _DISK_FULL_TEXT) or _SHORT_WRITE.fullmatch(str(error)) is not None


def _check_export(out: Path) -> None:
    """Raise UsageError unless a folder is an export and holds nothing else: whatever it holds will be gone."""
    remedy = "choose another output folder, or move away yourself what is in it"
    if not (out / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{out}: holds files but no {MANIFEST_NAME}, so it is not an earlier export and is not replaced; {remedy}"
        )
    try:
        manifest = Manifest.from_dict(read_json(out / MANIFEST_NAME), origin=MANIFEST_NAME)
    except UsageError as error:
        raise UsageError(f"{out}: is not an earlier export, so it is not replaced ({error}); {remedy}") from error
    known = {MANIFEST_NAME, *manifest.files}
    found = (path for path in out.rglob("*") if path.is_symlink() or not path.is_dir())
    others = sorted(name for path in found if (name := path.relative_to(out).as_posix()) not in known)
    if others:
        more = f" and {len(others) - _NAMES_SHOWN} more" if len(others) > _NAMES_SHOWN else ""
        names = ", ".join(others[:_NAMES_SHOWN])
        raise UsageError(f"{out}: holds files that the export did not write ({names}{more}), so it is not replaced; {remedy}")


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UsageError(f"{name}: an export holds plain files and folders only")
        if path.is_file() and name != MANIFEST_NAME:
            yield name, path
