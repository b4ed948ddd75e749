"""Stop strings: text that comes in pieces ends where one of them appears, also where it spans pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clada_export.errors import UsageError, shown
from clada_export.runtime.tokens import require_text


def stop_strings(stop: Any) -> tuple[str, ...]:
    """Stop strings as a caller gives them: None, a text, or texts.

    Raises:
        UsageError: something else, or an empty text.
    """
    if stop is None:
        return ()
    given = [stop] if isinstance(stop, str) else stop
    if isinstance(given, bytes) or not isinstance(given, Sequence) or not all(isinstance(text, str) for text in given):
        raise UsageError(f"stop is {shown(stop)}; give a text, or a list of texts")
    for text in given:
        if not text:
            raise UsageError("stop has an empty text, which is everywhere; give at least one character")
        require_text(text, "stop")
    return tuple(given)


class StopFilter:
    """Lets text through until a stop string is complete; what may be the beginning of one is held back.

    The first to be complete ends the text, and of two that end together the longer: how the text is cut into pieces makes no
    difference.

    Args:
        stops: at least one, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string has come: then it is all up to there."""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        kept = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def flush(self) -> str:
        """What was held back, at the end of a text without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text are the first of a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
