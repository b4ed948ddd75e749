"""Speed of several engines side by side: they take turns within each round, so that noise of the machine meets all of them.

Every engine runs in a process of its own and waits, asleep, while another plays: in one process, the thread pools and memory of
several ONNX Runtime sessions slow each other down (the dense peer by half, when it was measured).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from clada_export.runtime import Engine, load_engine
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

    def decode(self, worker: Connection, prompt: list[int], new_tokens: int) -> None:
        """One round of greedy decoding, in the worker."""
        worker.send((prompt, new_tokens, self.load))
        times = worker.recv()
        self.ttft_s.append(times["ttft_s"])
        self.itl_s.append(times["itl_s"])
        if times["skipped"] is not None:
            self.skipped.append(times["skipped"])

    def prefill(self, worker: Connection, prompt: list[int]) -> None:
        """One round of a prompt alone, in the worker."""
        worker.send((prompt, 0, self.load))
        self.prompt_s.append(worker.recv()["prompt_s"])

    def forget(self, long: bool) -> None:
        """Drop the times of the long prompts, or the others: a warm-up is over."""
        if long:
            self.prompt_s = []
        else:
            self.itl_s, self.ttft_s, self.skipped = [], [], []

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


def _work(folder: Path, threads: int | None, pipe: Connection) -> None:
    """What a worker does: play each round that it is sent, until it is sent None."""
    engine = load_engine(folder, threads=threads)
    widths = engine.sparse_neurons
    while (task := pipe.recv()) is not None:
        prompt, new_tokens, load = task
        if new_tokens == 0:
            start = time.perf_counter()
            engine.prefill([prompt])
            pipe.send({"prompt_s": time.perf_counter() - start})
            continue
        made = engine.generate([prompt], new_tokens, load=load, eos_token_id=[], do_sample=False)
        skipped = 1.0 - float(made.active.sum(-1).mean()) / widths if made.active is not None and widths else None
        pipe.send({"ttft_s": made.ttft_s, "itl_s": made.decode_s, "skipped": skipped})


@contextmanager
def _workers(folders: Sequence[Path], threads: int | None) -> Iterator[dict[Path, Connection]]:
    """One process for each folder."""
    context = get_context("spawn")
    running, pipes = [], {}
    try:
        for folder in dict.fromkeys(folders):
            pipes[folder], theirs = context.Pipe()
            process = context.Process(target=_work, args=(folder, threads, theirs), daemon=True)
            process.start()
            # Ours would keep the pipe open after the worker died, and `recv` would wait for ever.
            theirs.close()
            running.append(process)
        yield pipes
        for pipe in pipes.values():
            pipe.send(None)
        for process in running:
            process.join(timeout=30)
    finally:
        for process in running:
            process.kill()


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
    threads: int | None,
    progress: Callable[[int, int, str], None],
) -> dict[str, dict[str, Any]]:
    """Time all contestants; the first is the peer.

    Args:
        prompts: token ids of a text for each round, long enough for the long prompt. The first is for a warm-up, which is not
            counted. Within a round all contestants get the same one.
        progress: called with the round, the number of rounds and a name, before it plays.
    """
    with _workers([contestant.engine.folder for contestant in contestants], threads) as workers:
        # All decoding comes before the first long prompt: what that leaves in a session's memory must not be part of it.
        for long in (False, True):
            for number, prompt in enumerate(prompts):
                shift = number % len(contestants)
                for contestant in [*contestants[shift:], *contestants[:shift]]:
                    progress(number, len(prompts) - 1, f"{contestant.name}, {'prompt' if long else 'decode'}")
                    worker = workers[contestant.engine.folder]
                    if long:
                        contestant.prefill(worker, prompt[:long_prompt_tokens])
                    else:
                        contestant.decode(worker, prompt[:prompt_tokens], new_tokens)
                if number == 0:
                    for contestant in contestants:
                        contestant.forget(long)
    return {contestant.name: contestant.summary(contestants[0]) for contestant in contestants}
