"""Values of a caller in messages."""

from __future__ import annotations

_LONGEST = 60


def shown(value: object) -> str:
    """The value as Python writes it, if that is short and can be had."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        return f"a value of type {type(value).__name__} that is too long to show"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
