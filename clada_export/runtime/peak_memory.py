"""The most memory that this process held at a time, of Linux's count."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def begin() -> None:
    """Count anew from here; where that is not allowed, the count goes on from the process's start."""
    with suppress(OSError):
        _CLEAR.write_text("5")


def peak() -> int | None:
    """Bytes resident at the peak since `begin`, pages of mapped files among them; None where the system does not say."""
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None
