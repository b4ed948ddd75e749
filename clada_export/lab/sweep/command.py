"""`clada sweep`: arguments, progress and exit code."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from clada_export.console import ConsoleProgress
from clada_export.errors import UsageError
from clada_export.lab.sweep.cells import Cell, Outcome, make_cells
from clada_export.lab.sweep.picture import table
from clada_export.lab.sweep.ray_pool import INSTEAD
from clada_export.lab.sweep.run import Listener, run_sweep
from clada_export.lab.sweep.worker import SweepJob
from clada_export.plan.ranges import require_between
from clada_export.workers.session import WorkerOptions, require_ray

MOST = 2**14
"""Of workers, of their threads, and of times that a cell is tried again."""


def run_command(options: argparse.Namespace, settings: Any, hub: dict[str, Any]) -> int:
    """Run a sweep as the command line asks for it; returns the exit code.

    Args:
        settings: `PolicySettings`.
        hub: arguments of `clada_export.source.load.load_source`.
    """
    from clada_export.calibration.cache import parse_cache_folder
    from clada_export.export_options import ExportOptions

    settings.check()
    cells = make_cells(options.policies, options.sparsities)
    # The options that an export shares are checked as an export checks them.
    ExportOptions(
        dtype=options.dtype,
        calibration_data=options.calibration_data,
        calibration_tokens=options.calibration_tokens,
        calibration_context=options.calibration_context,
        seed=options.seed,
    ).check()
    pool = pool_options(options.ray_address, options.workers, options.threads, options.retries, len(cells))
    threads = pool.threads if pool is not None else options.threads or len(os.sched_getaffinity(0))
    job = SweepJob(
        model=_absolute(options.model),
        dtype=options.dtype,
        settings=settings,
        load_response=options.load_response,
        text_file=_resolved(options.calibration_data),
        tokens_file=_resolved(options.calibration_tokens),
        context=options.calibration_context,
        seed=options.seed,
        cache=parse_cache_folder(options.calibration_cache),
        threads=threads,
        hub=hub,
    )
    path = options.output or Path(f"{Path(options.model.rstrip('/')).stem}-sweep")
    progress = ConsoleProgress(quiet=options.quiet)
    progress.begin("sweep")
    try:
        result = run_sweep(job, cells, path, pool=pool, retries=options.retries, listener=_Console(progress, len(cells)))
    finally:
        progress.stop()
    if result.picture is None:
        progress.tell("no picture: matplotlib is missing (pip install 'clada-export[sweep]')")
    if options.json:
        print(json.dumps({"path": str(result.path), **result.summary}))
    else:
        print(table(result.outcomes))
    failed = sum(not outcome.done for outcome in result.outcomes)
    if failed:
        progress.warn(f"{failed} of {len(cells)} cells failed; run the same command again to try them again")
    return result.exit_code


def pool_options(
    address: str | None, workers: int | None, threads: int | None, retries: int, cells: int
) -> WorkerOptions | None:
    """Where cells run; None is in this process.

    Raises:
        UsageError: numbers out of range, or workers in this process on a cluster.
        BackendError: workers are asked for, and Ray is not installed.
    """
    for name, value, least in (("--workers", workers, 0), ("--threads", threads, 1), ("--retries", retries, 0)):
        require_between(name, value, (least, MOST))
    if workers == 0:
        if address is not None:
            raise UsageError("--workers 0 runs cells in this process; leave --ray-address out")
        return None
    asked = address is not None or (workers is not None and workers > 1)
    if not asked and importlib.util.find_spec("ray") is None:
        return None
    require_ray(INSTEAD)
    processors = len(os.sched_getaffinity(0))
    if address is not None:
        return WorkerOptions(workers or cells, threads or 1, address, retries)
    workers = min(workers or processors, cells)
    return WorkerOptions(workers, threads or max(1, processors // workers), None, retries)


class _Console(Listener):
    def __init__(self, progress: ConsoleProgress, total: int) -> None:
        self._progress = progress
        progress.step("sweep", "opening the model", 0, total)

    def warn(self, text: str) -> None:
        self._progress.warn(text)

    def finished(self, outcome: Outcome, done: int, total: int) -> None:
        self._progress.step("sweep", "cells", done, total)
        mark = "✓" if outcome.done else "✗"
        self._progress.tell(f"[{mark}] {done}/{total} {_told(outcome.cell)}  {_numbers(outcome)}")


def _told(cell: Cell) -> str:
    return f"{cell!s:<24}"


def _numbers(outcome: Outcome) -> str:
    values = outcome.values
    if values is None:
        return outcome.reason
    return f"KL {values['kl']:.4f}, bytes x{values['relative_bytes']:.3f}, {values['seconds']:.1f} s"


def _absolute(model: str) -> str:
    """A path that other processes find too; a Hub id stays as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _resolved(path: Path | None) -> Path | None:
    return None if path is None else path.resolve()
