"""`WeightsForm`: in which form an engine holds its weights, as `--weights` says it and a plan keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from clada_export.errors import UsageError

FLOATS = ("float32", "bfloat16", "float16")
AUTO = "auto"
"""What `--weights` takes to have the form chosen."""
KINDS = ("ffn", "attention", "head", "embedding")
"""Of matrices: those of the FFNs, every other product's but the last, the last one's, and the table of the tokens."""
_BITS = (4, 5, 6, 8)
NEAREST, SEARCH, COMPENSATED = "nearest", "search", "compensated"
ROUNDINGS = (NEAREST, SEARCH, COMPENSATED)
"""How codes are chosen: the nearest for scales that follow from the largest weights, for scales that are searched for, or such
that later weights make up for the errors of earlier ones on the calibration text (`clada_export.quantise.compensate`)."""
SCALE_BITS = 0.5
"""A weight's share of the float16 scale of its block of 32."""


def code_bytes(bits: int) -> float:
    """Bytes that a weight in codes takes, its share of the scales included."""
    return (bits + SCALE_BITS) / 8


@dataclass(frozen=True)
class WeightsForm:
    """How an engine's matrices are quantised: the bits of a code, for each kind of matrix.

    Attributes:
        name: what `--weights` calls it.
        rounding: one of `ROUNDINGS`.
    """

    name: str
    ffn: int
    attention: int
    head: int
    embedding: int
    rounding: str

    def bits(self, kind: str) -> int:
        """Of a kind of `KINDS`."""
        return {"ffn": self.ffn, "attention": self.attention, "head": self.head, "embedding": self.embedding}[kind]

    def weight_bytes(self, kind: str) -> float:
        """Bytes that a weight of a kind takes, its share of the scales included."""
        return code_bytes(self.bits(kind))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Any, origin: str) -> WeightsForm | None:
        """Read what a plan says; None where it says nothing.

        Args:
            origin: the plan, for the message.

        Raises:
            UsageError: a form that this program does not have.
        """
        if value is None:
            return None
        known = isinstance(value, Mapping) and set(value) == set(cls.__dataclass_fields__)
        if not known or not isinstance(value["name"], str) or value["rounding"] not in ROUNDINGS:
            raise UsageError(f"{origin}: source: weights: {value!r} is not a form of weights; make the plan again")
        wrong = next((kind for kind in KINDS if type(value[kind]) is not int or value[kind] not in _BITS), None)
        if wrong is not None:
            allowed = ", ".join(map(str, _BITS))
            raise UsageError(f"{origin}: source: weights: {wrong} has {value[wrong]!r} bits; allowed: {allowed}")
        return cls(**value)


FORMS = {
    form.name: form
    for form in (
        WeightsForm("int8", 8, 8, 8, 8, SEARCH),
        WeightsForm("int6", 6, 8, 6, 8, COMPENSATED),
        WeightsForm("int5", 5, 6, 6, 8, COMPENSATED),
        WeightsForm("int4", 4, 6, 6, 8, COMPENSATED),
    )
}
"""By the name that `--weights` takes, the widest first.

They are called by the bits of the FFNs, which are most of the weights. Attention has more: by the byte, a bit of it is worth
some times what one of the FFNs is. The head's last two bits are worth the least of all. A table of its own keeps 8, as a token
reads one row of it (docs/decisions/0024-quantised-weights.md has the numbers).
"""
WEIGHTS = (*FLOATS, *FORMS, AUTO)
"""All that `--weights` takes."""
