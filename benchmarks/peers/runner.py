"""What every engine does for the benchmark.

Nothing here or in the modules of peers needs more than NumPy and the peer's own package, so that a worker runs in the
environment of that package.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


class Scorer(ABC):
    """What says how likely it finds a text."""

    @abstractmethod
    def score(self, tokens: Sequence[int], prompt: int) -> Logits:
        """Logits [n - prompt - 1, V] after each of tokens[prompt:-1]; the first `prompt` tokens run at once, others alone."""


class Runner(Scorer):
    """One engine with one sequence."""

    @abstractmethod
    def start(self, prompt: Sequence[int]) -> Logits:
        """Forget what was before and run a prompt: logits [V] of the token after it, valid until the next call."""

    @abstractmethod
    def step(self, token: int) -> Logits:
        """Run one more token: logits [V] of the next, valid until the next call."""

    def decode(self, prompt: Sequence[int], new_tokens: int) -> tuple[float, list[float]]:
        """Greedy decoding: seconds until the first token is known, and of each token after it."""
        begin = time.perf_counter()
        token = int(self.start(prompt).argmax())
        first = time.perf_counter() - begin
        steps = []
        for _ in range(new_tokens):
            begin = time.perf_counter()
            token = int(self.step(token).argmax())
            steps.append(time.perf_counter() - begin)
        return first, steps

    def score(self, tokens: Sequence[int], prompt: int) -> Logits:
        self.start(tokens[:prompt])
        return np.stack([self.step(token).copy() for token in tokens[prompt:-1]])
