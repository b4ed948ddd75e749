"""What a result has to say about the machine and the versions; no dates and no paths."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from clada_export import __version__

PACKAGES = ("onnxruntime", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")
_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "sve")
_SOURCES = ("clada_export", "graph_passes", "plugins", "CMakeLists.txt")
ROOT = Path(__file__).resolve().parents[1]


def describe(threads: int) -> dict[str, Any]:
    """CPU, memory, threads, versions and commit."""
    return {
        "machine": {
            "cpu": _cpu(),
            "features": _features(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": threads,
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "clada-export": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of the sources, with `+` when they have been changed since; None outside a checkout."""
    head = _git("rev-parse", "HEAD")
    return head and head.strip() + ("+" if _git("status", "--porcelain", "--", *_SOURCES) else "")


def busy() -> float:
    """How many processes wanted to run in the last minute, a core."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def _cpu() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or "unknown"


def _features() -> list[str]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return [name for name in _FEATURES if name in flags]
