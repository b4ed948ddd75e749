"""How a plan was made: the text, the goal, what was compared, searched and measured.

`CalibrationRecord` is the `calibration` of a plan's JSON, which `PLAN_SCHEMA` describes. A field that a way of planning does
not have is None, and not in the JSON. What a policy tells of its own making (`training`, `imported`) is in `details`, by its
own names, as it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from clada_export.plan.goal import Goal


@dataclass(frozen=True)
class ComparedVariant:
    """A variant of the policy under an allocation, at the sparsity of comparison: mean KL in nats a token."""

    variant: str
    allocation: str
    kl: float
    sparsity: float


@dataclass(frozen=True)
class SearchedSparsity:
    """A measurement of the search: mean KL in nats a token, the rise of perplexity relative, and `cost` as `Budget.cost` has
    it, the largest share of a limit (1 is all of it).

    Plans that have no `ppl_increase` were written when `cost` was in the unit of a budget's one bound.
    """

    sparsity: float
    cost: float
    kl: float
    ppl_increase: float | None = None


@dataclass(frozen=True)
class TriedResponse:
    """A response to the load that was tried (`clada_export.calibration.load_response`): KL, gain and its standard error in nats
    a token, the latter -1 where it is not known; `better` says that it was taken."""

    signal: str | None = None
    slope: float | None = None
    kl: float | None = None
    kl_without: float | None = None
    gain: float | None = None
    standard_error: float | None = None
    sparsity: float | None = None
    better: bool | None = None


@dataclass(frozen=True)
class PolicyRow:
    """One policy in the table of a choice; numbers that were not measured are None.

    `kl` in nats a token, `ppl_increase` relative, `relative_bytes` of the dense FFNs' bytes, `seconds` what calibrating it took
    beside what all policies share, `cost` the largest share of the budget's limits (1 is all of it), one standard error on the
    safe side.
    """

    policy: str
    why: str
    variant: str | None = None
    allocation: str | None = None
    sparsity: float | None = None
    kl: float | None = None
    ppl_increase: float | None = None
    cost: float | None = None
    relative_bytes: float | None = None
    seconds: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class PolicyChoice:
    """How `--policy auto` chose: for which `goal`, by which `rule`, among which `candidates`; `text` is one sentence about it.

    `clock` is what timing the chosen plan gave, or says under `left_out` why it was not timed.
    """

    goal: str | None = None
    rule: str | None = None
    chosen: str | None = None
    candidates: tuple[PolicyRow, ...] = ()
    clock: Mapping[str, Any] | None = None
    text: str | None = None

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> PolicyChoice:
        """Read what follows `PLAN_SCHEMA`."""
        known = _known(cls, value)
        return cls(**{**known, "candidates": _rows(PolicyRow, value.get("candidates", ()))})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as `plan.calibration.auto` in the JSON."""
        value = {item.name: getattr(self, item.name) for item in fields(self)}
        return _without_none({**value, "candidates": [asdict(row) for row in self.candidates]})


@dataclass(frozen=True)
class CalibrationRecord:
    """How a plan was made.

    Attributes:
        text: where the calibration text came from; `digest` is its sha256.
        calibration_tokens, heldout_tokens: how many of it calibrated, and decided.
        context: tokens of a window, of which the first `prompt_tokens` ran dense.
        goal: the JSON's `budget`.
        variant, allocation: of the policy, as chosen.
        details: what the policy tells of its making, JSON values by its own names.
        drift: `Drift.summary()` of the plan on the held-out text; None for numbers that JSON does not have.
        pruning: the report of the pruning, and the `text_digest` of the text that it was made with.
        relative_bytes: that the FFNs read for one token at load 0, relative to the dense ones.
        auto: how the policy was chosen, if it was.
    """

    text: str | None = None
    digest: str | None = None
    calibration_tokens: int | None = None
    context: int | None = None
    heldout_tokens: int | None = None
    prompt_tokens: int | None = None
    goal: Goal | None = None
    variant: str | None = None
    allocation: str | None = None
    compared: tuple[ComparedVariant, ...] | None = None
    search: tuple[SearchedSparsity, ...] | None = None
    load_response: tuple[TriedResponse, ...] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    drift: Mapping[str, float | None] | None = None
    pruning: Mapping[str, Any] | None = None
    relative_bytes: float | None = None
    auto: PolicyChoice | None = None

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> CalibrationRecord:
        """Read what follows `PLAN_SCHEMA`.

        Raises:
            UsageError: a budget that is none.
        """
        known = {name: item for name, item in value.items() if name in _PLAIN}
        known |= {name: _rows(kind, value[name]) for name, kind in _LISTS.items() if name in value}
        if "budget" in value:
            known["goal"] = Goal.parse(value["budget"])
        if "auto" in value:
            known["auto"] = PolicyChoice.from_dict(value["auto"])
        told = {name: item for name, item in value.items() if name not in {*_PLAIN, *_LISTS, "budget", "auto"}}
        return cls(**known, details=told)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        value: dict[str, Any] = {}
        for item in fields(self):
            content = getattr(self, item.name)
            if item.name == "details":
                value |= content
            elif item.name == "goal":
                value["budget"] = None if content is None else content.text
            elif item.name in _LISTS:
                value[item.name] = None if content is None else [_without_none(asdict(row)) for row in content]
            else:
                value[item.name] = content.to_dict() if isinstance(content, PolicyChoice) else content
        return {name: item for name, item in value.items() if item is not None or name in self.details}


_LISTS: dict[str, type[Any]] = {"compared": ComparedVariant, "search": SearchedSparsity, "load_response": TriedResponse}
_PLAIN = {item.name for item in fields(CalibrationRecord)} - {*_LISTS, "goal", "details", "auto"}
_Row = TypeVar("_Row")


def _rows(kind: type[_Row], values: Sequence[Mapping[str, Any]]) -> tuple[_Row, ...]:
    return tuple(kind(**_known(kind, value)) for value in values)


def _known(kind: type[Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """Of a JSON object what there are fields for; a later version may have written more."""
    names = {item.name for item in fields(kind)}
    return {name: item for name, item in value.items() if name in names}


def _without_none(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if item is not None}
