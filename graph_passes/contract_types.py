"""What the op's contract is stated with. The statements are `graph_passes.contract`, which is made from
`plugins/sparse_ffn.yaml`; the generator (`plugins/contract/`) reads that file into these types too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Scalar = str | int | float
When = Mapping[str, tuple[Scalar, ...]]
"""Attributes by name, and the values that each may have for something to be there."""

_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


def holds(when: When, attributes: object) -> bool:
    """Whether all attributes in `when` have one of their values; True of none."""
    return all(getattr(attributes, name) in values for name, values in when.items())


@dataclass(frozen=True)
class Attribute:
    """One attribute of the op.

    Attributes:
        type: `string`, `int` or `float`.
        allowed: the values it may have; empty for numbers that a `Constraint` bounds.
        by_reference: the function body reads the node's value; otherwise it is baked into a variant of the body.
        read_when: where it means anything.
        limits: its range in words, such as "at least 0".
        meaning, note: for the documentation.
    """

    name: str
    type: str
    default: Scalar
    allowed: tuple[Scalar, ...] = ()
    by_reference: bool = False
    read_when: When = field(default_factory=dict)
    limits: str = ""
    meaning: str = ""
    note: str = ""

    @property
    def is_flag(self) -> bool:
        """0 or 1: a bool in Python and C++."""
        return self.type == "int" and self.allowed == (0, 1)


@dataclass(frozen=True)
class Instead:
    """The type and the shapes that a tensor has where `unless` does not hold."""

    type: str
    shapes: tuple[tuple[str | int, ...], ...]
    unless: When


@dataclass(frozen=True)
class Tensor:
    """An input or an output.

    Attributes:
        type: an element type, W (the weights') or X (of x and y).
        shapes: those it may have. An axis is a number, or a size: `rows` (several axes), B, d, f, n, E, T, R, Q, or one of them
            divided, `d/2`.
        when: it is there iff these hold.
        only_first_when: where the first shape is the only one.
        instead: another type and other shapes, and where.
        meaning: for the documentation.
    """

    name: str
    type: str
    shapes: tuple[tuple[str | int, ...], ...]
    when: When = field(default_factory=dict)
    only_first_when: When = field(default_factory=dict)
    instead: Instead | None = None
    meaning: str = ""

    def shapes_with(self, attributes: object) -> tuple[tuple[str | int, ...], ...]:
        """The shapes that a node with these attributes may have."""
        if self.instead is not None and not holds(self.instead.unless, attributes):
            return self.instead.shapes
        return self.shapes[:1] if self.only_first_when and holds(self.only_first_when, attributes) else self.shapes

    @property
    def is_constant(self) -> bool:
        """No size is the call's: a weight, or what is made from weights."""
        return not any(axis in ("rows", "B") for shape in self.shapes for axis in shape)


@dataclass(frozen=True)
class Condition:
    """`left compare right`: an attribute against a value, or against the attribute of the name `right`."""

    left: str
    compare: str
    right: Scalar
    right_is_attribute: bool = False

    def holds(self, attributes: object) -> bool:
        right = getattr(attributes, str(self.right)) if self.right_is_attribute else self.right
        return _COMPARE[self.compare](getattr(attributes, self.left), right)


@dataclass(frozen=True)
class Constraint:
    """If any of `if_any` holds, or there is none, all of `want` must; `message` has attributes in braces."""

    if_any: tuple[Condition, ...]
    want: tuple[Condition, ...]
    message: str

    def broken(self, attributes: object) -> bool:
        """Whether the attributes break it."""
        asked = not self.if_any or any(condition.holds(attributes) for condition in self.if_any)
        return asked and not all(condition.holds(attributes) for condition in self.want)


def shape_of(axes: tuple[str | int, ...], sizes: Mapping[str, int], rows: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The axes of a `Tensor` as numbers; `sizes` has those that occur, but `rows`."""
    return tuple(number for axis in axes for number in _numbers(axis, sizes, rows))


def _numbers(axis: str | int, sizes: Mapping[str, int], rows: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(axis, int):
        return (axis,)
    if axis == "rows":
        return rows
    name, _, divisor = axis.partition("/")
    return (sizes[name] // int(divisor or 1),)
