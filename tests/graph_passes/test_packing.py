"""Gate and up that come from one product: every way in which graphs take them apart again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from handmade import HIDDEN, WIDTH, Handmade, rewritten_alike

from graph_passes import find_ffns

Parts = Callable[[Handmade, ir.Value], list[ir.Value]]


def _ints(g: Handmade, *values: int, scalar: bool = False) -> ir.Value:
    array = np.array(values[0] if scalar else values, dtype=np.int64)
    return g.const(f"ints_{len(g.initializers)}", array)


def _split(g: Handmade, source: ir.Value, sizes: list[int], axis: int, shape: list[int | str]) -> list[ir.Value]:
    parts = list(g.tape.op_multi_out("Split", [source, _ints(g, *sizes)], {"axis": axis}, num_outputs=len(sizes)))
    for index, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        here = [*shape]
        here[axis] = size
        part.name, part.shape, part.type = f"{source.name}.{index}", ir.Shape(here), ir.TensorType(ir.DataType.FLOAT)
    return parts


def _slice(g: Handmade, source: ir.Value, start: int, stop: int, axis: int, step: int, shape: list[int | str]) -> ir.Value:
    return g.op("Slice", source, *(_ints(g, number) for number in (start, stop, axis, step)), shape=shape)


def _two_axes(g: Handmade, packed: ir.Value, outer: int, inner: int) -> ir.Value:
    return g.op("Reshape", packed, _ints(g, 0, 0, outer, inner), shape=["b", "s", outer, inner])


def _squeeze(g: Handmade, value: ir.Value, axis: int) -> ir.Value:
    return g.op("Squeeze", value, _ints(g, axis), shape=["b", "s", WIDTH])


def _halves_by_split(g: Handmade, packed: ir.Value) -> list[ir.Value]:
    return _split(g, packed, [WIDTH, WIDTH], 2, ["b", "s", 2 * WIDTH])


def _halves_by_slice(g: Handmade, packed: ir.Value) -> list[ir.Value]:
    ends = ((0, WIDTH), (WIDTH, 2**63 - 1))
    return [_slice(g, packed, *end, -1, 1, ["b", "s", WIDTH]) for end in ends]


def _halves_by_gather(g: Handmade, packed: ir.Value) -> list[ir.Value]:
    pairs = _two_axes(g, packed, 2, WIDTH)
    # Moshi: x.view(b, s, 2, -1)[..., i, :]
    return [g.op("Gather", pairs, _ints(g, place, scalar=True), axis=2, shape=["b", "s", WIDTH]) for place in (0, -1)]


def _halves_by_split_and_squeeze(g: Handmade, packed: ir.Value) -> list[ir.Value]:
    parts = _split(g, _two_axes(g, packed, 2, WIDTH), [1, 1], -2, ["b", "s", 2, WIDTH])
    return [_squeeze(g, part, 2) for part in parts]


def _turns_by_slice(g: Handmade, packed: ir.Value) -> list[ir.Value]:
    return [_slice(g, packed, start, 2**63 - 1, 2, 2, ["b", "s", WIDTH]) for start in (0, 1)]


def _turns_by_gather(g: Handmade, packed: ir.Value) -> list[ir.Value]:
    pairs = _two_axes(g, packed, WIDTH, 2)
    return [g.op("Gather", pairs, _ints(g, place, scalar=True), axis=-1, shape=["b", "s", WIDTH]) for place in (0, 1)]


def _turns_by_slice_and_squeeze(g: Handmade, packed: ir.Value) -> list[ir.Value]:
    pairs = _two_axes(g, packed, WIDTH, 2)
    return [_squeeze(g, _slice(g, pairs, place, place + 1, 3, 1, ["b", "s", WIDTH, 1]), -1) for place in (0, 1)]


def _turns_by_gather_and_squeeze(g: Handmade, packed: ir.Value) -> list[ir.Value]:
    pairs = _two_axes(g, packed, WIDTH, 2)
    return [_squeeze(g, g.op("Gather", pairs, _ints(g, place), axis=3, shape=["b", "s", WIDTH, 1]), 3) for place in (0, 1)]


HALVES = (_halves_by_split, _halves_by_slice, _halves_by_gather, _halves_by_split_and_squeeze)
TURNS = (_turns_by_slice, _turns_by_gather, _turns_by_slice_and_squeeze, _turns_by_gather_and_squeeze)


def _packed(parts: Parts, *, bias: bool, up_first: bool) -> tuple[ir.Model, np.ndarray]:
    """(a SwiGLU layer, its packed weight)."""
    g = Handmade()
    weight = g.weight("packed", HIDDEN, 2 * WIDTH)
    both = g.matmul(g.x, weight)
    if bias:
        both = g.op("Add", both, g.weight("bias", 2 * WIDTH), shape=["b", "s", 2 * WIDTH])
    first, second = parts(g, both)
    gate, up = (second, first) if up_first else (first, second)
    y = g.matmul(g.op("Mul", g.silu(gate), up), g.weight("d", WIDTH, HIDDEN), module="mlp.down_proj")
    assert weight.const_value is not None
    return g.model(y), weight.const_value.numpy()


@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("parts", [*HALVES, *TURNS])
def test_both_parts_are_found(parts: Parts, bias: bool, up_first: bool) -> None:
    (before, weight), (after, _) = (_packed(parts, bias=bias, up_first=up_first) for _ in range(2))
    first, second = (weight[:, :WIDTH], weight[:, WIDTH:]) if parts in HALVES else (weight[:, ::2], weight[:, 1::2])
    (match,) = find_ffns(before).matches
    assert match.gate is not None
    np.testing.assert_array_equal(match.gate.read(), second if up_first else first)
    np.testing.assert_array_equal(match.up.read(), first if up_first else second)
    assert rewritten_alike(before, after).has_bias == bias


def test_an_axis_that_is_not_half_of_the_packed_one_is_refused() -> None:
    """A Reshape that takes rows into the new axes: its parts are no columns."""
    g = Handmade()
    both = g.matmul(g.x, g.weight("packed", HIDDEN, WIDTH))
    pairs = g.op("Reshape", both, _ints(g, 0, -1, 2, WIDTH), shape=["b", "half", 2, WIDTH])
    gate, up = (g.op("Gather", pairs, _ints(g, place, scalar=True), axis=2, shape=["b", "half", WIDTH]) for place in (0, 1))
    y = g.matmul(g.op("Mul", g.silu(gate), up), g.weight("d", WIDTH, HIDDEN), module="mlp.down_proj")
    search = find_ffns(g.model(y), ["mlp.down_proj"])
    assert not search.matches and "is the result of Gather" in search.misses[0].reason
