"""Run a function of a module as a process of its own and record its time and peak memory.

    python -m benchmarks.child RECORD.json MODULE:FUNCTION ARGUMENT...

The peak is VmHWM, which starts anew with the process; `ru_maxrss` would start at what the parent had.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clada_export.errors import CladaError


@dataclass(frozen=True)
class Cost:
    """Seconds of the whole process, start of Python and imports included, and its peak resident memory."""

    seconds: float
    peak_bytes: int

    def to_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return asdict(self)


class ChildFailedError(Exception):
    """The process ended with another exit code than 0; it has said why on stderr."""


def run_child(function: str, arguments: Sequence[str], record: Path) -> tuple[str, Cost]:
    """Run `MODULE:FUNCTION` with a list of arguments; its stderr goes where ours goes.

    Returns:
        What it wrote to stdout, and what it cost.

    Raises:
        ChildFailedError: its exit code is not 0.
    """
    record.unlink(missing_ok=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.child", str(record), function, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0 or not record.is_file():
        raise ChildFailedError(f"{function} {' '.join(arguments)}: exit code {done.returncode}")
    peak = int(json.loads(record.read_text())["peak_bytes"])
    record.unlink()
    return done.stdout, Cost(seconds, peak)


def main() -> int:
    """The process."""
    record, target, *arguments = sys.argv[1:]
    module, _, function = target.partition(":")
    try:
        code = int(getattr(importlib.import_module(module), function)(arguments))
    except CladaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    Path(record).write_text(json.dumps({"peak_bytes": int(found[1]) * 1024 if found else 0}))
    return code


if __name__ == "__main__":
    sys.exit(main())
