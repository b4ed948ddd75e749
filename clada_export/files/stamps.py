"""What was hashed before, so that files that nobody has touched since need not be read again.

A stamp is what the file system says of a file when it is hashed: device, inode, size, and both times. A program can set the
time of the last change to the content, but not that of the last change to the inode. Stamps lie in the user's own cache: the
author of an export could write them into its folder. One that can't be read or trusted is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Self

FORMAT = "clada-export checked files 1"
SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was read may change again within one tick of its file system's clock."""
_LONGEST = 8 << 20


@dataclass(frozen=True)
class Stamp:
    """A file as it was when it was hashed; times in nanoseconds."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, found: os.stat_result) -> Self:
        """The stamp of an open file."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def settled(self, now: int) -> bool:
        """Whether a later change would show in it.

        Args:
            now: nanoseconds since 1970, from before the file was read.
        """
        return now - max(self.modified, self.changed) > SETTLED_NS


@dataclass(frozen=True)
class Known:
    """A file that was hashed: its sha256, and its stamp then."""

    sha256: str
    stamp: Stamp


class StampFile:
    """The stamps of one folder with one manifest.

    Args:
        place: the folder, as `os.path.realpath` gives it.
        digest: of its manifest.
    """

    def __init__(self, place: str, digest: str) -> None:
        self._key = f"{digest} {place}"
        home = cache_home()
        name = hashlib.sha256(os.fsencode(self._key)).hexdigest()
        self.path = None if home is None else home / "checked" / f"{name}.json"

    def read(self) -> dict[str, Known]:
        """What is known, by file name; nothing if the file is missing, damaged, or somebody else could have written it."""
        if self.path is None:
            return {}
        try:
            value = json.loads(_read_own(self.path))
            if value["format"] != FORMAT or value["key"] != _printable(self._key):
                return {}
            return {name: _known(*record) for name, record in value["files"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}

    def write(self, files: Mapping[str, Known]) -> None:
        """Replace what is known. Where that can't be written the next check takes longer, so failure is silent."""
        if self.path is None:
            return
        records = {name: [known.sha256, *astuple(known.stamp)] for name, known in sorted(files.items())}
        content = json.dumps({"format": FORMAT, "key": _printable(self._key), "files": records})
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                with os.fdopen(
                    os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
                ) as stream:
                    stream.write(content)
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)


def cache_home() -> Path | None:
    """`$XDG_CACHE_HOME/clada-export`, or `~/.cache/clada-export`; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    # The specification of XDG says that a relative path is to be ignored.
    if base and Path(base).is_absolute():
        return Path(base) / "clada-export"
    try:
        return Path.home() / ".cache" / "clada-export"
    except RuntimeError:
        return None


def _read_own(path: Path) -> bytes:
    """The bytes of a file that only this user can write.

    Raises:
        OSError: there is none.
        ValueError: it is somebody else's, no regular file, or far too long.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        private = found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o022
        if not stat.S_ISREG(found.st_mode) or not private or found.st_size > _LONGEST:
            raise ValueError(f"{path}: not a file of stamps")
        return stream.read(_LONGEST)


def _known(sha256: Any, *numbers: Any) -> Known:
    if not isinstance(sha256, str) or any(type(number) is not int for number in numbers):
        raise ValueError("not a stamp")
    return Known(sha256, Stamp(*numbers))


def _printable(text: str) -> str:
    # A path need not be UTF-8, and JSON has to be.
    return text.encode("utf-8", "backslashreplace").decode()
