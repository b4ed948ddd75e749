"""An engine folder of this tool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.peers.runner import Logits, Runner
from clada_export.load.values import DENSE
from clada_export.runtime import LoadMeter, load_engine
from clada_export.runtime.engine import StepOutput


class CladaRunner(Runner):
    """At a load: `auto` (what the engine's load signal says), `dense`, or a number."""

    def __init__(self, path: str, threads: int, load: str) -> None:
        self._engine = load_engine(Path(path), threads=threads)
        self._load = None if load == "auto" else np.float32(DENSE if load == "dense" else float(load))
        self._meter: LoadMeter | None = None
        self._output: StepOutput | None = None

    def start(self, prompt: Sequence[int]) -> Logits:
        self._meter = LoadMeter(self._engine.manifest.load_signal)
        self._output = self._engine.prefill([list(prompt)])
        return np.asarray(self._output.logits[0])

    def step(self, token: int) -> Logits:
        output, tokens = self._output, np.array([token])
        assert output is not None and self._meter is not None
        if self._load is None:
            loads = self._meter.update(output.logits, tokens, log_sum_exp=output.log_sum_exp, entropy=output.entropy)
        else:
            loads = np.full(1, self._load, np.float32)
        self._output = self._engine.step(tokens, loads)
        return np.asarray(self._output.logits[0])


def open_runner(path: str, threads: int, load: str) -> Runner:
    """See the class."""
    return CladaRunner(path, threads, load)
