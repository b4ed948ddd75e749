"""What a policy is: where scores come from, and which rule picks neurons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from clada_export.ffn import EagerFFN


class Policy(Protocol):
    """One method. Its file in `clada_export/policies/` is the only place that knows it."""

    @property
    def name(self) -> str:
        """What `--policy` calls it."""
        ...

    @property
    def rule(self) -> str:
        """The op's rule."""
        ...

    @property
    def scores(self) -> tuple[str, ...]:
        """The op's scores that it can use, the default first."""
        ...

    def score_for(self, ffns: Sequence[EagerFFN], wanted: str | None) -> str:
        """The score to use for these FFNs.

        Raises:
            UsageError: `wanted` is not one of the policy's scores, or the FFNs can't carry it.
        """
        ...
