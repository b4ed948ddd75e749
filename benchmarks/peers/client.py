"""The benchmark's end of a worker."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.environment import ROOT
from benchmarks.peers.runner import Logits
from clada_export.errors import BackendError


@dataclass(frozen=True)
class Contestant:
    """An engine: `kind` of `worker.KINDS`, where it lies, the Python that has its package, a load for those that take one."""

    name: str
    kind: str
    path: str
    python: str
    load: str = "auto"

    def to_dict(self) -> dict[str, str]:
        """What makes its results its own; not where things lie on this machine."""
        return {key: value for key, value in asdict(self).items() if key not in ("python", "path")}


class Worker(AbstractContextManager["Worker"]):
    """A running engine.

    Raises:
        BackendError: from each call, when the process has ended; it has said why on stderr.
    """

    def __init__(self, contestant: Contestant, threads: int) -> None:
        self._name = contestant.name
        command = [
            contestant.python, "-m", "benchmarks.peers.worker",
            contestant.kind, contestant.path, str(threads), contestant.load,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def time(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        """Seconds to the first token (`ttft_s`) and of each after it (`step_s`)."""
        return self._ask({"prompt": list(prompt), "new_tokens": new_tokens})

    def logits(self, tokens: Sequence[int], prompt: int, path: Path) -> Logits:
        """Logits [tokens - prompt - 1, V]; `path` (.npy) holds them on the way and stays."""
        self._ask({"tokens": list(tokens), "prompt": prompt, "logits": str(path)})
        found: Logits = np.load(path, mmap_mode="r")
        return found

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _ask(self, task: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended, and reading says so
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BackendError(f"{self._name}: its process ended with exit code {self._process.wait()}; it says why above")
        answer: dict[str, Any] = json.loads(line)
        return answer
