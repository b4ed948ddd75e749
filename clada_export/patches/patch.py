"""What is known of a patch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """A private part of another library that is used or changed.

    Attributes:
        name: of the module in this folder.
        package: the distribution whose part it is.
        made_for: the version that it was written for and last looked at with.
        reason: what the library does without it.
        until: what the library has to do so that it can go. `tests/clada_export/patches/` looks for that.
    """

    name: str
    package: str
    made_for: str
    reason: str
    until: str
