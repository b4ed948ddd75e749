"""What a plan was made for: a budget of drift, a sparsity, or what a checkpoint says of itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from clada_export.errors import UsageError

DEFAULT_BUDGET = "ppl=2%,kl=0.05"
"""What an export keeps if nothing else is asked (`docs/decisions/0017-budgets.md`)."""

_FORMS = (
    "ppl=2% (perplexity rises by at most 2%), kl=0.05 (nats a token), both with a comma between, or cett=0.2 (relative error "
    "of every FFN)"
)
_EXAMPLES = {"ppl": "ppl=2%", "kl": "kl=0.05 (nats)", "cett": "cett=0.2"}
_RANGES = {"ppl": "above 0% and below 100%", "kl": "above 0 and below 2 nats", "cett": "above 0 and below 1"}
_HIGHEST = {"ppl": 1.0, "kl": 2.0, "cett": 1.0}
_DRIFTS = {"ppl": "ppl_increase", "kl": "kl"}
_LARGEST = 1e300
_IMPORTED = "imported"


class DriftBounds(Protocol):
    """Of a measured drift what a budget is held against: each one standard error on the safe side."""

    @property
    def ppl_increase_bound(self) -> float:
        """The relative rise of perplexity."""
        ...

    @property
    def kl_bound(self) -> float:
        """KL(dense || sparse), nats a token."""
        ...


@dataclass(frozen=True)
class Budget:
    """How much error is allowed; every bound that is not None must hold.

    Attributes:
        ppl: the relative rise of perplexity.
        kl: KL(dense || sparse), nats a token.
        cett: the mean relative error of every FFN's output (arXiv 2402.03804). It bounds thresholds and no drift, so it stands
            alone.
    """

    ppl: float | None = None
    kl: float | None = None
    cett: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `ppl=2%`, `kl=0.05`, `ppl=2%,kl=0.05` or `cett=0.2`.

        Raises:
            UsageError: another form, a bound twice, CETT with another, or a limit out of range: 0 to 100% (both excluded), KL
                0 to 2 nats, CETT 0 to 1.
        """
        limits: dict[str, float] = {}
        for part in text.split(","):
            metric, limit = _bound(part, text)
            if metric in limits:
                raise UsageError(f"--budget {text!r} bounds {metric} twice; give it one limit")
            limits[metric] = limit
        if "cett" in limits and len(limits) > 1:
            raise UsageError(f"--budget {text!r}: a CETT bounds every FFN and not the drift; give it alone, like cett=0.2")
        return cls(**limits)

    def __str__(self) -> str:
        return ",".join(f"{metric}={_amount(metric, limit)}" for metric, limit in self.limits.items())

    @property
    def limits(self) -> dict[str, float]:
        """The bounds there are, by `ppl`, `kl` or `cett`."""
        known = {"ppl": self.ppl, "kl": self.kl, "cett": self.cett}
        return {metric: limit for metric, limit in known.items() if limit is not None}

    def keeps(self, drift: DriftBounds) -> bool:
        """Whether a drift is within every bound; a CETT is no drift."""
        return all(value <= self.limits[metric] for metric, value in self._measured(drift).items())

    def shares(self, drift: DriftBounds) -> tuple[float, ...]:
        """What of each bound's limit the drift takes, 1 is all of it, in the order of `limits`; never infinite."""
        return tuple(min(value / self.limits[metric], _LARGEST) for metric, value in self._measured(drift).items())

    def cost(self, drift: DriftBounds) -> float:
        """The largest of `shares`."""
        return max(self.shares(drift))

    def told(self, drift: DriftBounds) -> str:
        """What the drift is, in the words of the budget: `ppl=3.1%,kl=0.02`."""
        return ",".join(f"{metric}={_rough(metric, value)}" for metric, value in self._measured(drift).items())

    def _measured(self, drift: DriftBounds) -> dict[str, float]:
        """Each bounded error, one standard error on the safe side, in the unit of its limit."""
        known = {"ppl": drift.ppl_increase_bound, "kl": drift.kl_bound}
        return {metric: value for metric, value in known.items() if metric in self.limits}


def _bound(part: str, text: str) -> tuple[str, float]:
    """(metric, limit) of one part of a budget's `text`."""
    match = re.fullmatch(r"\s*([a-z][a-z0-9_]*)\s*=\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(%?)\s*", part)
    where = f"--budget {text!r}"
    if match is None:
        what = "has an empty part" if not part.strip() and text.strip() else "is not understood"
        raise UsageError(f"{where} {what}; give {_FORMS}")
    metric, number, percent = match[1], float(match[2]), match[3]
    if metric not in _RANGES:
        raise UsageError(f"{where}: {metric!r} is not known; give {_FORMS}")
    if metric == "ppl" and not percent:
        raise UsageError(f"{where}: a perplexity budget is given in percent, like {_EXAMPLES[metric]}")
    if metric != "ppl" and percent:
        raise UsageError(f"{where}: {metric} is given as a plain number, like {_EXAMPLES[metric]}")
    limit = number / 100 if percent else number
    if not 0.0 < limit < _HIGHEST[metric]:
        raise UsageError(f"{where}: {metric} is out of range, it must be {_RANGES[metric]}")
    return metric, limit


def _amount(metric: str, limit: float) -> str:
    """A limit such that reading it gives the same again to four digits."""
    if metric != "ppl":
        return f"{limit:.6g}"
    # Four places are none of a very small limit, and what a plan says is read again.
    return f"{limit:.4%}" if limit >= 1e-4 else f"{limit * 100:.6g}%"


def _rough(metric: str, value: float) -> str:
    return f"{value:.3%}" if metric == "ppl" else f"{value:.4g}"


@dataclass(frozen=True)
class Goal:
    """What a plan was to keep.

    Attributes:
        text: how the plan's JSON says it.
        budget: where it is one; a sparsity, an imported mixture and what a user wrote himself have none.
        imported: whether nothing was calibrated, because the checkpoint chooses its experts itself.
    """

    text: str
    budget: Budget | None = None
    imported: bool = False

    @classmethod
    def of(cls, budget: Budget, sparsity: float | None) -> Goal:
        """A fixed sparsity if there is one, else the budget."""
        return cls(str(budget), budget) if sparsity is None else cls(f"sparsity={sparsity:.4g}")

    @classmethod
    def of_import(cls) -> Goal:
        """A checkpoint's own experts."""
        return cls(_IMPORTED, imported=True)

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Read what a plan says.

        Raises:
            UsageError: a budget that is none.
        """
        metric, equals, _ = text.partition("=")
        return cls(text, Budget.parse(text) if equals and metric in _RANGES else None, text == _IMPORTED)

    @property
    def drift_limits(self) -> dict[str, float]:
        """The drift that the budget allows, by what it is measured in (`ppl_increase`, `kl`); none without such a budget."""
        limits = {} if self.budget is None else self.budget.limits
        return {_DRIFTS[metric]: limit for metric, limit in limits.items() if metric in _DRIFTS}

    def __str__(self) -> str:
        return self.text
