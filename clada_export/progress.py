"""Progress and timings of the stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

SOONEST = 2.0
"""Seconds after which it is said how long something takes: before, the first step says too little."""


class Progress(Protocol):
    """What shows progress to a user."""

    def begin(self, stage: str) -> None:
        """A stage begins."""

    def step(self, stage: str, what: str, done: int, total: int) -> None:
        """Something within the stage is done; total 0 means that the number is not known."""

    def end(self, stage: str, seconds: float, note: str) -> None:
        """The stage is done."""


class Remaining:
    """How long something will take that is counted while it goes on; counts that begin anew are something else."""

    def __init__(self) -> None:
        self._start, self._first, self._last = 0.0, 0, -1

    def left(self, done: int, total: int, now: float) -> float | None:
        """Seconds that are left at the pace so far; None where nothing can be said.

        Args:
            done, total: of the count; total 0 means that it is not known.
            now: seconds, of any clock.
        """
        if not total:
            return None
        if self._last < 0 or done < self._last:
            self._start, self._first = now, done
        self._last = done
        taken, counted = now - self._start, done - self._first
        return None if counted <= 0 or taken < SOONEST else taken / counted * max(total - done, 0)


class Stages:
    """Runs stages one after the other: `with stages("trace") as note: ...`; `seconds` holds the time of each."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self._current = ""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[Callable[[str], None]]:
        """Time a stage. The value yielded takes a note that is shown when it is done."""
        notes: list[str] = []
        self._current = stage
        if self._progress is not None:
            self._progress.begin(stage)
        start = time.perf_counter()
        yield notes.append
        self.seconds[stage] = time.perf_counter() - start
        if self._progress is not None:
            self._progress.end(stage, self.seconds[stage], ", ".join(notes))

    def inner(self, what: str, done: int, total: int) -> None:
        """Progress within the current stage."""
        if self._progress is not None:
            self._progress.step(self._current, what, done, total)
