"""How much of a calibration is done: passes over windows of text, counted before they are made."""

from __future__ import annotations

from clada_export.calibration.context import Progress


class WorkCount:
    """Counts units of work, and tells progress of all of it: (what, units done, units that there are by now's estimate).

    A unit is about a window of text through the model. What a search will take is not known before: parts are estimated, and an
    estimate gives way to the number when the part ends.

    Args:
        progress: called with (what, done, total).
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._left: dict[str, float] = {}
        self._done = 0.0

    def expect(self, part: str, units: float) -> None:
        """Say what a part will take."""
        self._left[part] = units

    def step(self, part: str, what: str, units: float = 1.0) -> None:
        """Some of a part is done. One that takes more than was expected never seems to be at its end."""
        self._done += units
        left = self._left.get(part, 0.0)
        self._left[part] = max(left - units, min(left, units))
        self._progress(what, round(self._done), max(round(self._done), round(self._done + sum(self._left.values()))))

    def end(self, part: str) -> None:
        """A part is done."""
        self._left.pop(part, None)
