"""Errors that a user sees. Each carries the exit code of the command line.

| code | class | meaning |
| --- | --- | --- |
| 1 | - | internal error: ours |
| 2 | `UsageError` | a wrong argument or a wrong input file |
| 3 | `UnsupportedModelError` | the model can't be compiled; the message says which layer and why |
| 4 | `VerificationError` | the engine does not do what the model does |
| 5 | `BackendError` | a backend or a library is missing or does not fit; the message says what to install |
"""

from __future__ import annotations


class CladaError(Exception):
    """Base of all errors that are meant for the user; `exit_code` is the process's exit code."""

    exit_code = 1


class UsageError(CladaError):
    """A wrong argument, a file that can't be read, an output folder that exists, a manifest that was edited."""

    exit_code = 2


class UnsupportedModelError(CladaError):
    """A model that can't be compiled."""

    exit_code = 3


class VerificationError(CladaError):
    """Parity or drift out of bounds."""

    exit_code = 4


class BackendError(CladaError):
    """A backend or a library is missing, or was built for another version of the op."""

    exit_code = 5


_LONGEST_SHOWN = 60


def shown(value: object) -> str:
    """A caller's value in a message: as Python writes it, if that is short and can be had."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        return f"a value of type {type(value).__name__} that is too long to show"
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."
