"""onnxruntime-genai."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.peers.runner import Logits, Runner

CONTEXT = 2048


class GenaiRunner(Runner):
    """A folder that its model builder wrote."""

    def __init__(self, path: str, threads: int, load: str) -> None:
        self._api: Any = importlib.import_module("onnxruntime_genai")
        config = self._api.Config(path)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = self._api.Model(config)
        self._generator: Any = None

    def start(self, prompt: Sequence[int]) -> Logits:
        settings = self._api.GeneratorParams(self._model)
        settings.set_search_options(max_length=CONTEXT, do_sample=False)
        self._generator = self._api.Generator(self._model, settings)
        self._generator.append_tokens(np.array([prompt], np.int32))
        return self._logits()

    def step(self, token: int) -> Logits:
        self._generator.append_tokens(np.array([[token]], np.int32))
        return self._logits()

    def decode(self, prompt: Sequence[int], new_tokens: int) -> tuple[float, list[float]]:
        """By its own loop, which chooses tokens without handing logits out."""
        begin = time.perf_counter()
        self.start(prompt)
        self._generator.generate_next_token()
        first = time.perf_counter() - begin
        steps = []
        for _ in range(new_tokens):
            begin = time.perf_counter()
            self._generator.generate_next_token()
            steps.append(time.perf_counter() - begin)
        return first, steps

    def _logits(self) -> Logits:
        found = np.asarray(self._generator.get_logits(), np.float32)
        last: Logits = found.reshape(-1, found.shape[-1])[-1]
        return last


def open_runner(path: str, threads: int, load: str) -> Runner:
    """`load` has no meaning here."""
    return GenaiRunner(path, threads, load)
