"""From what an export was asked to the runner that calibrates it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clada_export.calibration.context import Progress
from clada_export.calibration.text import CalibrationData
from clada_export.calibration.windows import Desk, InProcess, Runner
from clada_export.errors import UsageError
from clada_export.plan.ranges import require_between
from clada_export.source.load import SourceModel
from clada_export.workers.pool import INSTEAD, WorkerPool
from clada_export.workers.session import WorkerOptions, require_ray
from clada_export.workers.worker import Order

MOST = 2**14
"""Of workers, and of their threads."""

AT_ONCE = 1
"""Held-out windows that a worker runs as one batch: so what is rounded together does not depend on how many workers there are,
and the least is done again when one dies."""

Runners = Callable[[Desk], Runner]


def parse_pool(workers: int, threads: int | None, address: str | None) -> WorkerOptions | None:
    """What `--calibration-workers`, `--calibration-threads` and `--ray-address` ask for; None is this process.

    Without a number of threads, workers share this machine's processors; on a cluster, whose machines are taken to be of this
    kind, each has as many as this machine.

    Raises:
        UsageError: a number out of range, or a cluster without workers.
        BackendError: workers are asked for, and Ray is not installed.
    """
    require_between("--calibration-workers", workers, (0, MOST))
    require_between("--calibration-threads", threads, (1, MOST))
    if workers == 0:
        if address is not None:
            raise UsageError(f"--ray-address {address} needs --calibration-workers N: how many workers the cluster is to run")
        return None
    require_ray(INSTEAD)
    processors = len(os.sched_getaffinity(0))
    share = processors if address is not None else max(1, processors // workers)
    return WorkerOptions(workers, threads or share, address)


@contextmanager
def calibrating(
    source: SourceModel,
    data: CalibrationData,
    pool: WorkerOptions | None,
    *,
    threads: int | None,
    dtype: str,
    target: str,
    hub: Mapping[str, Any],
    prompt: int,
    progress: Progress,
    tell: Callable[[str], None],
) -> Iterator[Runners]:
    """What makes the runner of a desk: workers while the context lasts, or this process.

    This process computes with as many threads as a worker meanwhile: what it prunes and trains is then what one process with
    so many threads would.

    Args:
        source: the model, with its weights on the grid of the engine's type.
        pool: None runs the windows in this process, with `threads` threads (None: as many as PyTorch takes).
        hub: arguments of `clada_export.source.load.load_source` beside the model, its revision and its type.
        prompt: tokens of every window that are its prompt.
        tell: told about workers that died or differ.

    Raises:
        BackendError: as `WorkerPool`.
    """
    with _threads(pool.threads if pool is not None else threads):
        if pool is None:
            yield InProcess
            return
        order = Order(
            model=_place(source),
            hub={**hub, "revision": source.revision},
            dtype=dtype,
            target=target,
            calibration=data.calibration,
            heldout=data.heldout,
            prompt=prompt,
            threads=pool.threads,
            at_once=AT_ONCE,
        )
        with WorkerPool(order, pool, tell, progress) as workers:
            yield workers.runner


def _place(source: SourceModel) -> str:
    """Where a worker finds the model: the Hub id, or the path."""
    return source.name if source.kind == "hub" else str(Path(source.graph or source.path).resolve())


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """PyTorch computes with so many threads meanwhile; None leaves it."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
