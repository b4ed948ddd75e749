"""The cells of a sweep, and what comes out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clada_export.errors import BackendError, CladaError, UsageError

VALUES = (
    "sparsity",
    "kl",
    "kl_bound",
    "ppl_increase",
    "top1",
    "relative_bytes",
    "seconds",
    "variant",
    "allocation",
)
"""What is measured in a cell: the share of skipped neurons, mean KL (nats a token) and the same one standard error higher, the
relative rise of perplexity, top-1 agreement, bytes read relative to dense (`clada_export.calibration.cost`), the seconds that
calibrating took, and the variant and allocation that were taken."""
LOST = BackendError.exit_code
"""The exit code of a cell whose worker died."""


@dataclass(frozen=True, order=True)
class Cell:
    """One policy at one mean sparsity."""

    policy: str
    sparsity: float

    def __str__(self) -> str:
        return f"{self.policy} at {self.sparsity:g}"

    @property
    def file_name(self) -> str:
        """Where its outcome is kept."""
        return f"{self.policy}-{self.sparsity:g}.json"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: `values` (`VALUES`), or the `reason` why there are none and the `exit_code` that it is worth."""

    cell: Cell
    values: dict[str, Any] | None = None
    reason: str = ""
    exit_code: int = 0
    attempts: int = 1

    @property
    def done(self) -> bool:
        """Whether there are values."""
        return self.values is not None

    @classmethod
    def failed(cls, cell: Cell, error: BaseException, attempts: int = 1) -> Outcome:
        """A cell that ended in an error."""
        if isinstance(error, CladaError):
            return cls(cell, None, str(error), error.exit_code, attempts)
        return cls(cell, None, f"{type(error).__name__}: {error}", CladaError.exit_code, attempts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "policy": self.cell.policy,
            "sparsity": self.cell.sparsity,
            "values": self.values,
            "reason": self.reason,
            "exit_code": self.exit_code,
            "attempts": self.attempts,
        }


def make_cells(policies: str | Sequence[str], sparsities: str | Sequence[float]) -> tuple[Cell, ...]:
    """All pairs, each once.

    Args:
        policies: names, or one text with commas between.
        sparsities: likewise.

    Raises:
        UsageError: an unknown policy, a sparsity that is out of range or no number, or nothing at all.
    """
    from clada_export.calibration.budget import parse_sparsity
    from clada_export.methods import get_policy

    names = [name.strip() for name in policies.split(",")] if isinstance(policies, str) else list(policies)
    numbers = [_number(text) for text in sparsities.split(",")] if isinstance(sparsities, str) else list(sparsities)
    for name in names:
        get_policy(name)
    for number in numbers:
        parse_sparsity(number)
    cells = tuple(dict.fromkeys(Cell(name, number) for name in names for number in numbers))
    if not cells:
        raise UsageError("a sweep needs at least one policy and one sparsity")
    return cells


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"--sparsities: {text.strip()!r} is not a number; give numbers with commas between, like 0.3,0.5"
        ) from None


def worst(outcomes: Sequence[Outcome]) -> int:
    """The exit code of a sweep: 0 if every cell has values; else 1 if a fault of ours is among the failures, or else the
    highest of theirs."""
    codes = {outcome.exit_code for outcome in outcomes if not outcome.done}
    if CladaError.exit_code in codes:
        return CladaError.exit_code
    return max(codes, default=0)
