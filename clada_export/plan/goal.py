"""What a plan was made for: a budget of drift, a sparsity, or what a checkpoint says of itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from clada_export.errors import UsageError

_FORMS = "ppl=2% (perplexity rises by at most 2%), kl=0.05 (nats a token) or cett=0.2 (relative error of every FFN)"
_EXAMPLES = {"kl": "kl=0.05 (nats)", "cett": "cett=0.2"}
_RANGES = {"ppl": "above 0% and below 100%", "kl": "above 0 and below 2 nats", "cett": "above 0 and below 1"}
_HIGHEST = {"ppl": 1.0, "kl": 2.0, "cett": 1.0}
_DRIFTS = {"ppl": "ppl_increase", "kl": "kl"}
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
    """How much error is allowed: `metric` is `ppl` (limit: relative rise of perplexity), `kl` (limit: nats a token) or `cett`
    (limit: the mean relative error of every FFN's output; arXiv 2402.03804)."""

    metric: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `ppl=2%`, `kl=0.05` or `cett=0.2`.

        Raises:
            UsageError: another form, or a limit out of range: 0 to 100% (both excluded), KL 0 to 2 nats, CETT 0 to 1.
        """
        match = re.fullmatch(r"\s*(ppl|kl|cett)\s*=\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(%?)\s*", text)
        if match is None:
            raise UsageError(f"--budget {text!r} is not understood; give {_FORMS}")
        metric, number, percent = match[1], float(match[2]), match[3]
        if metric == "ppl" and not percent:
            raise UsageError(f"--budget {text!r}: a perplexity budget is given in percent, like ppl=2%")
        if metric != "ppl" and percent:
            raise UsageError(f"--budget {text!r}: {metric} is given as a plain number, like {_EXAMPLES[metric]}")
        limit = number / 100 if percent else number
        if not 0.0 < limit < _HIGHEST[metric]:
            raise UsageError(f"--budget {text!r} is out of range: it must be {_RANGES[metric]}")
        return cls(metric, limit)

    def __str__(self) -> str:
        if self.metric != "ppl":
            return f"{self.metric}={self.limit:.6g}"
        # Four places are none of a very small limit, and what a plan says is read again.
        return f"ppl={self.limit:.4%}" if self.limit >= 1e-4 else f"ppl={self.limit * 100:.6g}%"

    def cost(self, drift: DriftBounds) -> float:
        """The measured error, one standard error on the safe side, in the budget's unit; a CETT is not a drift."""
        return drift.ppl_increase_bound if self.metric == "ppl" else drift.kl_bound


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
        if self.budget is None or self.budget.metric not in _DRIFTS:
            return {}
        return {_DRIFTS[self.budget.metric]: self.budget.limit}

    def __str__(self) -> str:
        return self.text
