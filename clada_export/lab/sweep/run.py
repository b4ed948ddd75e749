"""Run a sweep: resume from its folder, run what is missing, write the summary and the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clada_export.lab.sweep.cells import Cell, Outcome, worst
from clada_export.lab.sweep.folder import PICTURE, SUMMARY, SweepFolder, check_folder
from clada_export.lab.sweep.local import run_local
from clada_export.lab.sweep.picture import draw
from clada_export.lab.sweep.ray_pool import RayPool
from clada_export.lab.sweep.worker import SweepJob, SweepWorker, Worker
from clada_export.workers.session import WorkerOptions


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep: the outcomes in the order of the cells, and what `sweep.json` holds."""

    path: Path
    outcomes: tuple[Outcome, ...]
    summary: dict[str, Any]
    picture: Path | None

    @property
    def exit_code(self) -> int:
        """See `clada_export.lab.sweep.cells.worst`."""
        return worst(self.outcomes)


class Listener:
    """What hears of a sweep while it runs; this one says nothing."""

    def warn(self, text: str) -> None:
        """Something the user should know."""

    def finished(self, outcome: Outcome, done: int, total: int) -> None:
        """A cell is finished, or was found finished."""


def run_sweep(
    job: SweepJob,
    cells: Sequence[Cell],
    path: Path,
    *,
    pool: WorkerOptions | None = None,
    retries: int = 2,
    listener: Listener | None = None,
    worker: Callable[[], Worker] | None = None,
) -> SweepResult:
    """Measure cells that have no values in the folder yet.

    Args:
        path: the folder of the sweep; made, or gone on with.
        pool: where Ray runs the cells; None runs them in this process, one after the other.
        retries: how often a cell is tried again after a fault, without a pool.
        worker: makes another worker than that of the job.

    Raises:
        UsageError: a folder of another model, text or settings; a model or text that can't be used.
        BackendError: Ray can't be used.
    """
    listener = listener or Listener()
    make = worker or partial(SweepWorker, job)
    check_folder(path)
    with ExitStack() as stack:
        ray = None if pool is None else stack.enter_context(RayPool(make, pool, listener.warn))
        here = make() if ray is None else None
        described = ray.describe() if ray is not None else here.describe() if here is not None else {}
        for warning in described.get("warnings", []):
            listener.warn(warning)
        folder = SweepFolder(path, described["identity"], listener.warn, described.get("about"))
        found = {outcome.cell: outcome for outcome in folder.known(cells)}
        for number, outcome in enumerate(found.values()):
            listener.finished(outcome, number + 1, len(cells))

        def finished(outcome: Outcome) -> None:
            found[outcome.cell] = outcome
            folder.save(outcome)
            listener.finished(outcome, len(found), len(cells))

        missing = [cell for cell in cells if cell not in found]
        if ray is not None:
            ray.run(missing, finished)
        elif here is not None:
            run_local(here, missing, retries, finished)
    outcomes = tuple(found[cell] for cell in cells)
    summary = folder.write_summary(outcomes)
    title = f"{described.get('about', {}).get('model', path.name)}: quality against bytes"
    picture = path / PICTURE if draw(outcomes, title, path / PICTURE) else None
    return SweepResult(path, outcomes, summary, picture)


__all__ = ["SUMMARY", "Listener", "SweepResult", "run_sweep"]
