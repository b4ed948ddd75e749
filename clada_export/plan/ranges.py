"""The ranges of numbers that a user may give: each is checked before any work, as each sizes something."""

from __future__ import annotations

from clada_export.errors import UsageError
from clada_export.plan.schema import LONGEST_CONTEXT, SHORTEST_CONTEXT

CONTEXT = (SHORTEST_CONTEXT, LONGEST_CONTEXT)
"""Tokens of a window."""
SEED = (0, 2**32 - 1)
"""What every generator takes; a layer's own seed is the user's plus its number."""
GRANULE = (1, 2**20)
RANK = (1, 2**16)
ROWS = (1, 2**24)
BATCH = (1, 2**16)
TOKENS = (1, 2**24)
"""Of one run of an engine, or of its cache."""


def require_between(option: str, value: int | None, allowed: tuple[int, int]) -> None:
    """Check a number; None was not given.

    Args:
        option: as the user writes it.
        allowed: least and greatest.

    Raises:
        UsageError: out of range; names the option and the range.
    """
    if value is not None and not allowed[0] <= value <= allowed[1]:
        raise UsageError(f"{option} {value} is out of range: it must be at least {allowed[0]} and at most {allowed[1]}")
