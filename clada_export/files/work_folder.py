"""`WorkFolder`: where an export is made, beside the folder that it becomes.

    .OUT.clada-TTTTTTTTCCCCCCCC/    T: random; C: a digest of T and OUT, the mark by which later runs know it for ours
        lock                        locked while the run that made it lives
        new/                        what is being written
        old/                        the earlier export, from when it is moved aside until `new` has taken its place

The mark is in the name because a folder is made with its name in one step: there is no moment at which a killed run leaves
something that has no mark. Whatever else lies beside OUT, however it is called, is somebody else's and is not touched.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_LONGEST_NAME = 255
_TOKEN = re.compile(r"\.clada-([0-9a-f]{8})([0-9a-f]{8})$")


@dataclass(frozen=True)
class WorkFolder:
    """A work folder that this process holds the lock of (`lock` is the open file's descriptor)."""

    path: Path
    lock: int

    @property
    def new(self) -> Path:
        """What becomes OUT."""
        return self.path / "new"

    @property
    def old(self) -> Path:
        """What was OUT."""
        return self.path / "old"

    @classmethod
    def make(cls, out: Path) -> Self:
        """Make one for `out`.

        Raises:
            OSError: it can't be made.
        """
        while True:
            path = out.with_name(_name(out, secrets.token_hex(4)))
            path.mkdir()
            try:
                lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except (FileNotFoundError, FileExistsError):
                continue  # another run took it for abandoned, in the moment in which it had no lock
            try:
                _lock(lock)
            except BlockingIOError:
                os.close(lock)
                continue  # the same, a moment later
            except OSError:
                pass  # a file system without locks: then nothing is ever taken for abandoned
            work = cls(path, lock)
            try:
                work.new.mkdir()
            except FileNotFoundError:
                os.close(lock)
                continue
            except BaseException:
                work.remove()
                raise
            return work

    def holds(self, file: str | bytes | int | None) -> bool:
        """Whether a file, as an OSError names it, lies in here."""
        return isinstance(file, str | bytes) and Path(os.path.abspath(os.fsdecode(file))).is_relative_to(self.path)  # noqa: PTH100

    def remove(self) -> None:
        """Remove the folder, then let go of its lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


def abandoned_work_folders(out: Path) -> Iterator[WorkFolder]:
    """The work folders for `out` whose runs are dead; each is this process's to remove."""
    with os.scandir(out.parent) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and _is_marked(entry.name, out))
    for name in names:
        path = out.with_name(name)
        try:
            # Not to wait for a writer, should somebody have put a FIFO there.
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        except OSError:
            continue
        try:
            _lock(lock)
        except OSError:
            os.close(lock)
            continue
        yield WorkFolder(path, lock)


def _lock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _name(out: Path, token: str) -> str:
    tail = f".clada-{token}{_mark(out, token)}"
    # A name has to fit; the part of it that says OUT is for people, and the mark does not need it.
    shown = os.fsencode(out.name)[: _LONGEST_NAME - len(tail) - 1].decode("utf-8", "ignore")
    return f".{shown}{tail}"


def _is_marked(name: str, out: Path) -> bool:
    found = _TOKEN.search(name)
    return found is not None and found[2] == _mark(out, found[1])


def _mark(out: Path, token: str) -> str:
    return hashlib.sha256(b"clada-export works on " + os.fsencode(out.name) + token.encode()).hexdigest()[:8]
