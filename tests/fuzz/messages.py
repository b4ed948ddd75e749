"""Protobuf messages with a few places changed, by their structure: what a damaged file seldom is, and a stranger's may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from google.protobuf.message import Message  # type: ignore[import-untyped]
from hypothesis import strategies as st

_BELOW = st.integers(0, 2**32 - 1)
_COUNT = st.integers(1, 4)
_NUMBER = st.sampled_from(
    [0, 1, -1, 2, 3, 7, 16, 22, 127, 1000, 10**6, 10**9, 2**31 - 1, 2**31, 2**40, 10**12, 2**63 - 1, -(2**63)]
)
_FLOAT = st.sampled_from([0.0, 1.0, -1.0, 1e30, float("inf"), float("nan")])
_TEXT = st.text(max_size=6) | st.sampled_from(["", "999999999999", "a" * 300, "../x", "/dev/zero", "com.microsoft", "ai.onnx"])
_OPERATORS = [
    "MatMul", "Gemm", "Add", "Mul", "Cast", "Reshape", "Concat", "Split", "Slice", "Gather", "Shape", "Expand",
    "Tile", "Range", "Pad", "ConstantOfShape", "Constant", "Loop", "If", "Scan", "Transpose", "Identity",
    "SplitToSequence", "SequenceAt", "ConcatFromSequence", "DequantizeLinear", "QuantizeLinear", "MatMulNBits",
    "FusedMatMul", "OneHot", "FastGelu", "Gelu", "Softmax", "Squeeze", "Unsqueeze", "Where", "NonZero", "EyeLike",
    "Resize", "Einsum", "silu", "times", "SparseFFN", "MoE", "LayerNormalization",
]  # fmt: skip
_OPERATOR = st.sampled_from(_OPERATORS)
_BYTES = st.binary(max_size=40)

Place = tuple[Any, Any, int | None]


@st.composite
def changed_message(draw: st.DrawFn, make: Callable[[], Any]) -> Any:
    """What `make` gives, with some fields set, dropped, repeated, exchanged, or taken from elsewhere in it."""
    message = make()
    for _ in range(draw(_COUNT)):
        _change(draw, message)
    return message


def _change(draw: st.DrawFn, root: Any) -> None:
    places = list(_places(root))
    if not places:
        return
    message, field, index = places[draw(_BELOW) % len(places)]
    repeated = index is not None
    how = draw(_BELOW) % 8
    if how == 0:
        message.ClearField(field.name) if not repeated else getattr(message, field.name).__delitem__(index)
        return
    if how == 1:
        # A field that is not there yet.
        unset = [each for each in message.DESCRIPTOR.fields if each.type != each.TYPE_MESSAGE]
        field = unset[draw(_BELOW) % len(unset)] if unset else field
        if field.type == field.TYPE_MESSAGE:
            return
        _set(message, field, None, _value(draw, field, places))
        return
    if field.type == field.TYPE_MESSAGE:
        alike = [found for found in places if found[1].message_type is field.message_type and found[1].message_type is not None]
        other = _get(alike[draw(_BELOW) % len(alike)])
        copy = type(other).FromString(other.SerializeToString())
        if repeated and how < 5:
            items = getattr(message, field.name)
            kept = [type(each).FromString(each.SerializeToString()) for each in items]
            kept.insert(draw(_BELOW) % (len(kept) + 1), copy)
            del items[:]
            items.extend(kept)
        else:
            _get((message, field, index)).CopyFrom(copy)
        return
    _set(message, field, index, _value(draw, field, places))


def _value(draw: st.DrawFn, field: Any, places: Sequence[Place]) -> Any:
    if field.type == field.TYPE_STRING:
        if field.name == "op_type" and draw(_BELOW) % 4:
            return draw(_OPERATOR)
        # Mostly a name from elsewhere: two of one, a cycle, another operator.
        names = [place for place in places if place[1].type == field.TYPE_STRING]
        return _get(names[draw(_BELOW) % len(names)]) if names and draw(_BELOW) % 3 else draw(_TEXT)
    if field.type == field.TYPE_BYTES:
        return draw(_BYTES)
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return draw(_FLOAT)
    if field.type == field.TYPE_ENUM:
        return field.enum_type.values[draw(_BELOW) % len(field.enum_type.values)].number
    return draw(_NUMBER)


def _set(message: Any, field: Any, index: int | None, value: Any) -> None:
    try:
        held = getattr(message, field.name)
        if index is not None:
            held[index] = value
        elif isinstance(held, str | bytes | int | float):
            setattr(message, field.name, value)
        else:
            held.append(value)
    except (ValueError, TypeError):
        pass  # out of the field's range, or no text


def _get(place: Place) -> Any:
    message, field, index = place
    value = getattr(message, field.name)
    return value if index is None else value[index]


def _places(root: Any) -> Iterator[Place]:
    """Every field that is set, and every item of a repeated one."""
    for field, value in root.ListFields():
        if isinstance(value, Message | str | bytes | int | float):
            yield root, field, None
            if isinstance(value, Message):
                yield from _places(value)
            continue
        for index, item in enumerate(value):
            if index < 64 or isinstance(item, Message):
                yield root, field, index
            if isinstance(item, Message):
                yield from _places(item)
