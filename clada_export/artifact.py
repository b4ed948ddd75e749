"""`ArtifactWriter`: the output folder appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from clada_export.errors import UsageError
from clada_export.manifest import MANIFEST_NAME, Manifest, file_record, write_manifest

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK_FULL_TEXT = ("No space left on device", "os error 28", "Disk quota exceeded")
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ArtifactWriter:
    """Writes an export into a temporary folder beside `out`, and renames it into place when it is complete.

    Use it as a context manager; put files under `path`, then call `commit`. Leaving the block in any other way, Ctrl-C and
    SIGTERM included, removes everything that was written. What a killed (SIGKILL) run left is removed by the next one.

    Args:
        out: the folder to make. Its parent must exist.
        overwrite: replace `out` if it is an earlier export or an empty folder.

    Raises:
        UsageError: on entry, when `out` can't be made; on leaving, when the disk is full.
    """

    def __init__(self, out: Path, overwrite: bool = False) -> None:
        # Not resolve(): whether `out` itself is a link matters.
        self.out = Path(os.path.abspath(out))  # noqa: PTH100
        self.overwrite = overwrite
        self._temporary: Path | None = None
        self._lock: int | None = None
        self._committed = False
        self._previous_handler: Any = None

    @property
    def path(self) -> Path:
        """The temporary folder to write into.

        Raises:
            RuntimeError: outside the `with` block.
        """
        if self._temporary is None:
            raise RuntimeError("ArtifactWriter.path is there only inside the with block")
        return self._temporary

    def __enter__(self) -> Self:
        try:
            with _signals_held():
                self._recover()
                self._check_target()
                self._make_temporary()
                self._catch_sigterm()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with _signals_held():
            free = shutil.disk_usage(self.out.parent).free if error is not None else 0
            self._clean()
        if error is not None and _is_disk_full(error):
            raise UsageError(
                f"{self.out}: the disk is full: {free} bytes were free in {self.out.parent} when writing failed; "
                "free some space or choose another folder. Nothing was left behind"
            ) from error

    def draft(self, manifest: Manifest) -> None:
        """Write the manifest for what the temporary folder holds so far, so that an engine can be loaded from it.

        Raises:
            UsageError: the manifest is not valid.
        """
        write_manifest(self.path, manifest.with_files(_records(self.path)))

    def commit(self, manifest: Manifest) -> Manifest:
        """Record every file, write the manifest last, and put the folder in place.

        Args:
            manifest: the manifest; its `files` are replaced by what the folder holds.

        Returns:
            The manifest as written.

        Raises:
            UsageError: the manifest is not valid, or the folder can't be put in place.
        """
        complete = manifest.with_files(_records(self.path))
        write_manifest(self.path, complete)
        with _signals_held():
            try:
                self._put_in_place()
            except OSError as error:
                if error.errno in _DISK_FULL:
                    raise
                raise UsageError(f"{self.out}: the finished export can't be put in place: {error.strerror or error}") from error
            self._committed = True
        return complete

    def _put_in_place(self) -> None:
        old: Path | None = None
        if self.overwrite and self.out.exists():
            self._check_target()
            old = self.out.with_name(f".{self.out.name}.old-{secrets.token_hex(4)}")
            self.out.rename(old)
        try:
            if self.out.exists():
                raise FileExistsError(errno.EEXIST, "it was made by someone else in the meantime", str(self.out))
            self.path.rename(self.out)
        except OSError:
            if old is not None:
                old.rename(self.out)
            raise
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def _check_target(self) -> None:
        parent, out = self.out.parent, self.out
        if not parent.is_dir():
            raise UsageError(f"{out}: the parent folder {parent} does not exist; make it first")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"{out}: the parent folder {parent} can't be written to")
        if not os.path.lexists(out):
            return
        if out.is_symlink() or not out.is_dir():
            raise UsageError(f"{out}: exists and is not a folder; choose another output folder")
        if not self.overwrite:
            raise UsageError(f"{out}: exists already; choose another output folder, or replace it with --overwrite")
        if any(out.iterdir()) and not (out / MANIFEST_NAME).is_file():
            raise UsageError(
                f"{out}: holds files but no {MANIFEST_NAME}, so it is not an earlier export and is not replaced; "
                "choose another output folder or remove it yourself"
            )

    def _make_temporary(self) -> None:
        temporary = self.out.with_name(f".{self.out.name}.tmp-{secrets.token_hex(4)}")
        try:
            temporary.mkdir()
            self._temporary = temporary
            # Held while this process lives: tells a later run whether the folder is abandoned.
            self._lock = os.open(temporary, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{self.out}: a folder can't be made in {self.out.parent}: {error.strerror or error}") from error

    def _recover(self) -> None:
        """Remove what killed runs left; put back a folder that was moved aside and never replaced."""
        if not self.out.parent.is_dir() or not os.access(self.out.parent, os.W_OK | os.X_OK):
            return
        for old in sorted(self.out.parent.glob(f".{_escape(self.out.name)}.old-????????")):
            if not os.path.lexists(self.out):
                old.rename(self.out)
            else:
                shutil.rmtree(old, ignore_errors=True)
        for temporary in sorted(self.out.parent.glob(f".{_escape(self.out.name)}.tmp-????????")):
            if not temporary.is_symlink() and _abandoned(temporary):
                shutil.rmtree(temporary, ignore_errors=True)

    def _clean(self) -> None:
        if self._temporary is not None and not self._committed:
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
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


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    # Native writers (safetensors, protobuf) report it as text in exceptions of their own.
    return isinstance(error, Exception) and any(text in str(error) for text in _DISK_FULL_TEXT)


def _abandoned(folder: Path) -> bool:
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def _escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    records = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UsageError(f"{name}: an export holds plain files and folders only")
        if path.is_file() and name != MANIFEST_NAME:
            records[name] = file_record(path)
    return records
