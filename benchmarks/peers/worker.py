"""One engine in a process of its own, in the Python that has its package. A line of JSON in, a line of JSON out.

PYTHON -m benchmarks.peers.worker KIND PATH THREADS LOAD

{"prompt": [..], "new_tokens": n}             -> {"ttft_s": .., "step_s": [..]}
{"tokens": [..], "prompt": n, "logits": FILE} -> {}, and logits float32 [tokens - n - 1, V] in FILE (.npy)
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.peers.runner import Runner, Scorer

KINDS = {
    "clada": "benchmarks.peers.clada",
    "llama": "benchmarks.peers.llama",
    "genai": "benchmarks.peers.genai",
    "reference": "benchmarks.peers.reference",
}


def answer(runner: Scorer, task: dict[str, Any]) -> dict[str, Any]:
    """Do one task."""
    if "logits" in task:
        np.save(task["logits"], runner.score(task["tokens"], task["prompt"]))
        return {}
    if not isinstance(runner, Runner):
        raise TypeError(f"{type(runner).__name__} scores texts and decodes none")
    first, steps = runner.decode(task["prompt"], task["new_tokens"])
    return {"ttft_s": first, "step_s": steps}


def main(arguments: Sequence[str]) -> int:
    """Serve until stdin ends."""
    kind, path, threads, load = arguments
    # What an engine writes to stdout must not get among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runner: Scorer = importlib.import_module(KINDS[kind]).open_runner(path, int(threads), load)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(runner, json.loads(line))), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
