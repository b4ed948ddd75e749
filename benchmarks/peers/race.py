"""Speed: engines take turns within each round, each in a process of its own, so that noise of the machine meets all of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

SETTLE_S = 0.2
"""Before each turn: threads of the engine before may still wait for work, awake."""


class Timer(Protocol):
    """A worker, or what stands in for one."""

    def time(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        """See `client.Worker`."""


Rounds = dict[str, list[dict[str, Any]]]
"""For each prompt length, as text: a record of each round."""


def race(
    workers: Mapping[str, Timer],
    done: dict[str, Rounds],
    prompts: Mapping[int, Sequence[Sequence[int]]],
    new_tokens: int,
    kept: Callable[[], None],
    progress: Callable[[str], None] = lambda text: None,
) -> None:
    """Play the rounds that are missing.

    Args:
        workers: by the engine's name.
        done: rounds by engine, from before; is added to.
        prompts: by length in tokens, a prompt for each round; all engines get the same one in a round. Round 0 warms up.
        kept: called after each round, when `done` is worth keeping.
    """
    for length, texts in prompts.items():
        key = str(length)
        for name, worker in workers.items():
            if len(done.setdefault(name, {}).setdefault(key, [])) < len(texts) - 1:
                progress(f"warm-up, {length} tokens: {name}")
                worker.time(texts[0], new_tokens)
        for number, prompt in enumerate(texts[1:]):
            names = [name for name in workers if len(done[name][key]) <= number]
            shift = number % max(1, len(names))
            for name in [*names[shift:], *names[:shift]]:
                progress(f"round {number + 1}/{len(texts) - 1}, {length} tokens: {name}")
                time.sleep(SETTLE_S)
                load = os.getloadavg()[0]
                times = workers[name].time(prompt, new_tokens)
                steps = times["step_s"]
                done[name][key].append(
                    {
                        "ms": 1e3 * statistics.median(steps),
                        "lowest_ms": 1e3 * min(steps),
                        "ttft_ms": 1e3 * times["ttft_s"],
                        "load_average": round(load, 2),
                    }
                )
            if names:
                kept()


def summary(rounds: Rounds) -> dict[str, Any]:
    """For each prompt length the median round, and the lowest and the highest: ms a token, and ms to the first token."""
    return {
        key: {
            "rounds": len(records),
            "ms": _spread([record["ms"] for record in records]),
            "lowest_ms": min(record["lowest_ms"] for record in records),
            "ttft_ms": _spread([record["ttft_ms"] for record in records]),
            "load_average": max(record["load_average"] for record in records),
        }
        for key, records in rounds.items()
        if records
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
