"""What this machine has left: memory under the limits of control groups, and space on a disk."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
_VERSIONS = (
    ("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)
"""Of control groups, version 2 and 1: the limit, what is used, and what of that the system takes back by itself."""


@dataclass(frozen=True)
class Disk:
    """A file system: its number, and the bytes that this user may still write."""

    device: int
    free: int


def available_memory(
    information: Path = Path("/proc/meminfo"), membership: Path = Path("/proc/self/cgroup"), groups: Path = GROUPS
) -> int | None:
    """Bytes that can still be had without swapping: by the system, and by every control group around this process.

    The page cache counts as free, in the group's account too: the system gives it back when it is asked for memory.

    Returns:
        None if nothing says.
    """
    return min(
        (value for value in (_of_system(information), *_of_groups(membership, groups)) if value is not None), default=None
    )


def disk(place: Path) -> Disk:
    """The disk on which a file would be made, whether its folders are there already or not.

    Raises:
        OSError: the system does not say.
    """
    there = place.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    found = os.statvfs(there)
    return Disk(there.stat().st_dev, found.f_bavail * found.f_frsize)


def _of_system(information: Path) -> int | None:
    try:
        text = information.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) << 10 if match else None


def _of_groups(membership: Path, groups: Path) -> Iterator[int]:
    """What is left of each limit. A container sees its own group as the root."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    places = {groups, groups / "memory"}
    for line in lines:
        _, _, path = line.partition(":")
        controllers, _, path = path.partition(":")
        # One line has no controllers (version 2), or one names this one (version 1).
        if controllers and "memory" not in controllers.split(","):
            continue
        within = groups / "memory" if controllers else groups
        inner = Path(path.lstrip("/"))
        if ".." not in inner.parts:
            places.update(within / part for part in (inner, *inner.parents))
    for place in sorted(places):
        for limit, used, reclaimed in _VERSIONS:
            left = _left(place, limit, used, reclaimed)
            if left is not None:
                yield left


def _left(place: Path, limit: str, used: str, reclaimed: tuple[str, ...]) -> int | None:
    try:
        most, now = int((place / limit).read_text()), int((place / used).read_text())
        counts = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None  # no such hierarchy, or "max"
    return max(0, most - max(0, now - sum(int(counts.get(name, 0)) for name in reclaimed)))
