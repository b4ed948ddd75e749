"""What commands print of text that a stranger may have written."""

from __future__ import annotations


def visible(text: str, kept: str = "") -> str:
    """Text without control characters, which would write to the terminal what they like.

    Args:
        kept: those that stay, such as the line breaks of a message of several lines.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in kept else ascii(char)[1:-1] for char in text)


def say(text: str = "") -> None:
    """Print one line to stdout."""
    print(visible(text))
