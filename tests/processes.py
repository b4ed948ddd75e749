"""Child processes for tests."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence


def start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a process with pipes on stdout and stderr that Ctrl-C can stop.

    A job that a shell puts into the background ignores SIGINT, and so does every process that it starts, unless that is undone.
    """
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(environment),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
