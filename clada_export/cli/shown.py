"""What commands print of text that a stranger may have written."""

from __future__ import annotations


def visible(text: str) -> str:
    """Text without control characters, line breaks included: they would write to the terminal what they like."""
    return text if text.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def say(text: str = "") -> None:
    """Print one line to stdout."""
    print(visible(text))
