"""Run cells in this process, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clada_export.errors import CladaError
from clada_export.lab.sweep.cells import Cell, Outcome
from clada_export.lab.sweep.worker import Worker


def run_local(worker: Worker, cells: Sequence[Cell], retries: int, finished: Callable[[Outcome], None]) -> None:
    """Run all cells; a fault ends its cell, not the sweep.

    Args:
        retries: how often a cell is tried again after a fault.
        finished: called with every outcome.
    """
    for cell in cells:
        finished(_run(worker, cell, retries))


def _run(worker: Worker, cell: Cell, retries: int) -> Outcome:
    attempt = 1
    while True:
        try:
            return _attempted(worker.run(cell), attempt)
        except CladaError as error:
            return Outcome.failed(cell, error, attempt)
        except Exception as error:
            if attempt > retries:
                return Outcome.failed(cell, error, attempt)
        attempt += 1


def _attempted(outcome: Outcome, attempts: int) -> Outcome:
    return Outcome(outcome.cell, outcome.values, outcome.reason, outcome.exit_code, attempts)
