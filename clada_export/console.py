"""What the command line shows: ticks and progress on stderr; `rich` on a terminal, plain lines on a pipe."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.status import Status
from rich.text import Text

from clada_export.progress import Remaining

LINES_EVERY = 10.0
"""Seconds between two lines of a stage on a pipe, at least."""


class StageLine:
    """What a stage is at, in one line: how long it has taken, what it does, and about how long that will go on.

    Args:
        began: when, seconds of `time.monotonic`.
    """

    def __init__(self, stage: str, began: float) -> None:
        self._stage, self._began = stage, began
        self._what, self._at = "", began
        self._left: float | None = None
        self._remaining = Remaining()

    def step(self, what: str, done: int, total: int, now: float) -> None:
        """Something is done; as `Progress.step`."""
        count = f" {done}/{total}" if total else f" {done}" if done else ""
        self._what = f"{what}{count}"
        self._left, self._at = self._remaining.left(done, total, now), now

    def text(self, now: float) -> str:
        """The line."""
        line = f"{self._stage} {now - self._began:.0f} s" + (f": {self._what}" if self._what else "")
        if self._left is None:
            return line
        # It counts down between two steps, which may be far apart.
        return f"{line}, about {max(self._left - (now - self._at), 0):.0f} s left"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text(time.monotonic()))


class ConsoleProgress:
    """Implements `clada_export.progress.Progress`: one tick line a stage, and what it is at.

    On a terminal that is a line which moves on by itself; on a pipe, a line now and then (`LINES_EVERY`).
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._status: Status | None = None
        self._line: StageLine | None = None
        self._said = 0.0

    def begin(self, stage: str) -> None:
        """A stage begins."""
        if self._quiet:
            return
        self._said = time.monotonic()
        self._line = StageLine(stage, self._said)
        if self._console.is_terminal:
            self._status = self._console.status(self._line)
            self._status.start()

    def step(self, stage: str, what: str, done: int, total: int) -> None:
        """Show what the stage is at."""
        if self._line is None:
            return
        now = time.monotonic()
        self._line.step(what, done, total, now)
        if self._status is None and now - self._said >= LINES_EVERY:
            self._said = now
            self._console.print(self._line.text(now), markup=False)

    def end(self, stage: str, seconds: float, note: str) -> None:
        """Print the tick line."""
        self.stop()
        if not self._quiet:
            tail = f"  {note}" if note else ""
            self._console.print(f"[✓] {stage:<18} {seconds:7.1f} s{tail}", markup=False)

    def warn(self, text: str) -> None:
        """Print a warning, quiet or not."""
        self._console.print(f"warning: {text}", markup=False)

    def tell(self, text: str) -> None:
        """Print something that the user may want to copy; nothing when quiet."""
        if not self._quiet:
            self._console.print(text, markup=False)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._line = None
        if self._status is not None:
            self._status.stop()
            self._status = None
