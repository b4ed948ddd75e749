"""What verification found, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One check: its numbers, the bound it was held to, and whether it passed. `why` says what failed, for the user."""

    name: str
    passed: bool
    numbers: dict[str, Any]
    bound: dict[str, float]
    why: str = ""


@dataclass
class Verification:
    """All checks of one run; `drift` repeats the numbers of the drift check.

    `deferred` says, in sentences, what could not be checked here and how to finish it.
    """

    checks: list[Check] = field(default_factory=list)
    drift: dict[str, Any] = field(default_factory=dict)
    deferred: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def failures(self) -> list[str]:
        """One line for each check that failed."""
        return [f"{check.name}: {check.why}" for check in self.checks if not check.passed]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "drift": self.drift,
            "deferred": self.deferred,
        }
