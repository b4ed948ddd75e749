"""Speed of several engines side by side: they take turns within each round, so that noise of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clada_export.runtime import Engine
from clada_export.runtime.engine import Load


@dataclass
class Contestant:
    """An engine at a load, and its times: one list entry a round."""

    name: str
    engine: Engine
    load: Load
    itl_s: list[list[float]] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    prompt_s: list[float] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)

    def play(self, prompt: list[int], long_prompt: list[int], new_tokens: int) -> None:
        """One round: generate greedily, then the long prompt alone."""
        made = self.engine.generate([prompt], new_tokens, load=self.load, eos_token_id=[])
        start = time.perf_counter()
        self.engine.prefill([long_prompt])
        self.prompt_s.append(time.perf_counter() - start)
        self.ttft_s.append(made.ttft_s)
        self.itl_s.append(made.decode_s)
        widths = sum(layer["intermediate_size"] for layer in self.engine.manifest.plan["layers"])
        if made.active is not None and widths:
            self.skipped.append(1.0 - float(made.active.sum(-1).mean()) / widths)

    def forget(self) -> None:
        """Drop the times: a warm-up is over."""
        self.itl_s, self.ttft_s, self.prompt_s, self.skipped = [], [], [], []

    def summary(self, peer: Contestant) -> dict[str, Any]:
        """Medians over everything, medians of each round, and ratios to the peer from the rounds."""
        steps = [step for round_steps in self.itl_s for step in round_steps]
        return {
            "tokens_per_s": 1.0 / float(np.percentile(steps, 50)),
            "itl_p50_ms": float(np.percentile(steps, 50)) * 1e3,
            "itl_p90_ms": float(np.percentile(steps, 90)) * 1e3,
            "ttft_ms": statistics.median(self.ttft_s) * 1e3,
            "prompt_ms": statistics.median(self.prompt_s) * 1e3,
            "sparsity": statistics.fmean(self.skipped) if self.skipped else 0.0,
            "rounds": {
                "itl_p50_ms": [statistics.median(times) * 1e3 for times in self.itl_s],
                "ttft_ms": [value * 1e3 for value in self.ttft_s],
                "prompt_ms": [value * 1e3 for value in self.prompt_s],
            },
            "speedup": {
                "decode": _ratios(map(statistics.median, peer.itl_s), map(statistics.median, self.itl_s)),
                "ttft": _ratios(peer.ttft_s, self.ttft_s),
                "prompt": _ratios(peer.prompt_s, self.prompt_s),
            },
        }


def _ratios(theirs: Any, ours: Any) -> dict[str, float]:
    """How many times faster, round by round: median, lowest, highest."""
    values = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def race(
    contestants: Sequence[Contestant],
    prompts: Sequence[list[int]],
    *,
    prompt_tokens: int,
    long_prompt_tokens: int,
    new_tokens: int,
    progress: Callable[[int, int, str], None],
) -> dict[str, dict[str, Any]]:
    """Time all contestants; the first is the peer.

    Args:
        prompts: token ids of a text for each round, long enough for the long prompt. The first is for a warm-up, which is not
            counted. Within a round all contestants get the same one.
        progress: called with the round, the number of rounds and a name, before it plays.
    """
    for number, prompt in enumerate(prompts):
        shift = number % len(contestants)
        for contestant in [*contestants[shift:], *contestants[:shift]]:
            progress(number, len(prompts) - 1, contestant.name)
            contestant.play(prompt[:prompt_tokens], prompt[:long_prompt_tokens], new_tokens)
        if number == 0:
            for contestant in contestants:
                contestant.forget()
    return {contestant.name: contestant.summary(contestants[0]) for contestant in contestants}
