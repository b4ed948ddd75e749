"""What the command line shows: ticks and progress on stderr; `rich` on a terminal, plain lines on a pipe."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console
from rich.status import Status


class ConsoleProgress:
    """Implements `clada_export.progress.Progress`: one tick line a stage, and on a terminal what it is at."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._status: Status | None = None

    def begin(self, stage: str) -> None:
        """A stage begins."""
        if not self._quiet and self._console.is_terminal:
            self._status = self._console.status(stage)
            self._status.start()

    def step(self, stage: str, what: str, done: int, total: int) -> None:
        """Show what the stage is at; nothing on a pipe."""
        if self._status is not None:
            count = f" {done}/{total}" if total else f" {done}" if done else ""
            self._status.update(f"{stage}: {what}{count}")

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
        if self._status is not None:
            self._status.stop()
            self._status = None
