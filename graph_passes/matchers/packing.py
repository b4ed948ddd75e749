"""Recognise which columns of a packed projection a value holds, one step backwards.

Gate and up often come from one product. What takes them apart again is a Split or a Slice of the last axis, or a Reshape that
makes two axes of it, of which one place is taken: [.., 2, f] for halves, [.., f, 2] for gate and up in turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.matchers.common import last_dim, trailing_dims
from graph_passes.matchers.weights import Columns, constant_integer, constant_integers


@dataclass(frozen=True)
class Part:
    """The columns of `source` that a value holds, and the nodes that take them, the last first."""

    source: ir.Value
    columns: Columns
    nodes: tuple[ir.Node, ...]


def packed_part(node: ir.Node, value: ir.Value) -> Part | None:
    """What `node`, which makes `value`, takes of a packed projection; None if it does something else."""
    source = node.inputs[0] if node.inputs else None
    if source is None:
        return None
    if node.op_type in ("Split", "Slice"):
        columns = _split_columns(node, value) if node.op_type == "Split" else _slice_columns(node)
        return None if columns is None else Part(source, columns, (node,))
    picked = _picked(node)
    return None if picked is None else _of_two_axes(*picked)


def split_widths(node: ir.Node) -> list[int] | None:
    """How many columns each result of a Split of the last axis has, if that is known."""
    return _sizes(node) if _from_the_end(node, node.attributes.get_int("axis", 0)) == -1 else None


def _sizes(split: ir.Node) -> list[int] | None:
    """How long each result of a Split is on its axis, if that is known."""
    sizes = constant_integers(split.inputs[1]) if len(split.inputs) > 1 else None
    if sizes is not None:
        return [int(size) for size in sizes] if sizes.shape == (len(split.outputs),) else None
    axis = _from_the_end(split, split.attributes.get_int("axis", 0))
    if axis is None:
        return None
    widths: list[int] = []
    for output in split.outputs:
        dims = trailing_dims(output, -axis)
        if dims is None:
            return None
        widths.append(dims[0])
    return widths


def _from_the_end(node: ir.Node, axis: int) -> int | None:
    """An axis of the node's input as a negative number; None if the number of axes is needed and not known."""
    if axis < 0:
        return axis
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return None if shape is None else axis - len(shape)


def _split_columns(node: ir.Node, value: ir.Value) -> Columns | None:
    """Which columns of its input the Split's output `value` holds."""
    widths = split_widths(node)
    if widths is None:
        return None
    index = next(i for i, output in enumerate(node.outputs) if output is value)
    start = sum(widths[:index])
    return Columns(start, start + widths[index])


def _slice_columns(node: ir.Node) -> Columns | None:
    """Which columns of its input a Slice of the last axis holds."""
    found = _slice(node)
    return found[1] if found is not None and found[0] == -1 else None


def _slice(node: ir.Node) -> tuple[int, Columns] | None:
    """(axis from the end, the places on it) of a Slice of one axis with constant ends, if that axis's size is known."""
    numbers = [constant_integer(value) for value in node.inputs[1:]]
    if len(numbers) < 3 or any(number is None for number in numbers):
        return None
    start, stop, given, step = [number or 0 for number in (*numbers, 1)[:4]]
    axis = _from_the_end(node, given)
    dims = None if axis is None else trailing_dims(node.inputs[0], -axis)
    if step < 1 or axis is None or dims is None:
        return None
    return axis, Columns(*slice(start, stop, step).indices(dims[0]))


def _picked(node: ir.Node) -> tuple[ir.Value, int, int, tuple[ir.Node, ...]] | None:
    """(value, axis from the end, index, nodes) where one place of an axis is taken and the axis is dropped.

    That is a Gather with a number, or a Squeeze after a Slice, Split or Gather that leaves one place.
    """
    if node.op_type == "Gather":
        index = constant_integers(node.inputs[1])
        axis = _from_the_end(node, node.attributes.get_int("axis", 0))
        if index is None or index.ndim != 0 or axis is None or node.inputs[0] is None:
            return None
        return node.inputs[0], axis, int(index), (node,)
    if node.op_type != "Squeeze" or node.inputs[0] is None:
        return None
    dropped = constant_integer(node.inputs[1]) if len(node.inputs) > 1 else None
    before = node.inputs[0].producer()
    axis = None if dropped is None else _from_the_end(node, dropped)
    if before is None or axis is None or before.inputs[0] is None:
        return None
    place = _one_place(before, node.inputs[0])
    if place is None or place[0] != axis:
        return None
    return before.inputs[0], axis, place[1], (node, before)


def _one_place(node: ir.Node, value: ir.Value) -> tuple[int, int] | None:
    """(axis from the end, index) of the only place that a Slice, Split or Gather leaves of an axis."""
    if node.op_type == "Slice":
        found = _slice(node)
        return (found[0], found[1].start) if found is not None and found[1].count == 1 else None
    if node.op_type == "Split":
        axis, sizes = _from_the_end(node, node.attributes.get_int("axis", 0)), _sizes(node)
        if axis is None or sizes is None or any(size != 1 for size in sizes):
            return None
        return axis, next(i for i, output in enumerate(node.outputs) if output is value)
    if node.op_type == "Gather":
        index = constant_integers(node.inputs[1])
        axis = _from_the_end(node, node.attributes.get_int("axis", 0))
        if index is not None and index.shape == (1,) and axis is not None:
            return axis, int(index[0])
    return None


def _of_two_axes(value: ir.Value, axis: int, index: int, nodes: tuple[ir.Node, ...]) -> Part | None:
    """Columns of what a Reshape makes two axes of, where one of these is reduced to the place `index`."""
    reshape = value.producer()
    dims = trailing_dims(value, 2)
    if reshape is None or reshape.op_type != "Reshape" or reshape.domain or reshape.inputs[0] is None or dims is None:
        return None
    source, (outer, inner) = reshape.inputs[0], dims
    # Rows stay what they are where the two axes together are the one that was.
    if last_dim(source) != outer * inner or axis not in (-1, -2):
        return None
    index %= dims[axis]
    columns = Columns(index * inner, (index + 1) * inner) if axis == -2 else Columns(index, outer * inner, inner)
    return Part(source, columns, (*nodes, reshape))
