"""Which processor cores each process of a test run has."""

from __future__ import annotations

import os
from collections.abc import Iterable


def share_of(number: int, processes: int, cores: Iterable[int]) -> set[int]:
    """The cores of one process: those of all processes are apart, unless there are fewer cores than processes.

    Args:
        number: of the process, from 0.
        processes: how many there are.
        cores: those of the machine that may be used.
    """
    found = sorted(cores)
    return set(found[number::processes]) or {found[number % len(found)]}


def keep_to_own_cores() -> None:
    """Bind this process, if pytest-xdist started it, to its share of the cores.

    ONNX Runtime makes a thread for each core it may use, and those of a session that waits keep their cores busy: two processes
    with two threads each on two cores took half as much again of both.
    """
    worker, processes = os.environ.get("PYTEST_XDIST_WORKER"), os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if worker and processes:
        os.sched_setaffinity(0, share_of(int(worker.removeprefix("gw")), int(processes), os.sched_getaffinity(0)))
