"""Progress and timings of the stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What shows progress to a user."""

    def begin(self, stage: str) -> None:
        """A stage begins."""

    def step(self, stage: str, what: str, done: int, total: int) -> None:
        """Something within the stage is done; total 0 means that the number is not known."""

    def end(self, stage: str, seconds: float, note: str) -> None:
        """The stage is done."""


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
