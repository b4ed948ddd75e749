"""How the passes write nodes: on a tape of onnx_ir (`onnx_ir.tape.Tape`), in the order in which they run; and read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Initializer = Callable[[str, np.ndarray], ir.Value]
"""Registers a constant of the graph under a name."""

AttributeValue = float | str | Sequence[int] | ir.TensorProtocol


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A constant of the graph; one of the same name is used again.

    Raises:
        ValueError: the graph has another constant of this name.
    """
    known = graph.initializers.get(name)
    if known is None:
        known = ir.val(name, const_value=ir.Tensor(array, name=name))
        graph.register_initializer(known)
    elif known.const_value is None or not _same(known.const_value.numpy(), array):
        raise ValueError(f"the graph has a constant {name!r} already, of another content")
    return known


def _same(known: np.ndarray, array: np.ndarray) -> bool:
    return known.dtype == array.dtype and np.array_equal(known, array)


def attribute_values(node: ir.Node) -> dict[str, Any]:
    """The attributes of a node, by name: numbers, texts, tensors."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


def result(name: str | None, dtype: ir.DataType | None, shape: ir.Shape | None) -> ir.Value:
    """What a node is to give: a value with a name, a type, and a shape of its own."""
    return ir.val(name, dtype, None if shape is None else shape.copy())


class Emitter:
    """Writes nodes of standard operators.

    Args:
        prefix: a node is called `{prefix}.{its number}.{its operator}` and its result `{node}.out`; with None, the graph that
            takes the nodes names them.
        tape: to write on, after what is there; a new one by default.
    """

    def __init__(self, prefix: str | None = None, tape: ir.tape.Tape | None = None) -> None:
        self.prefix = prefix
        self.tape = ir.tape.Tape() if tape is None else tape
        self._first = len(self.tape.nodes)

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: AttributeValue) -> ir.Value:
        """A node with one result."""
        return self.several(op_type, 1, *inputs, **attributes)[0]

    def several(
        self, op_type: str, count: int, *inputs: ir.Value | None, **attributes: AttributeValue | ir.Graph
    ) -> Sequence[ir.Value]:
        """A node with `count` results; those after the first are called `{node}.out.{index}`."""
        name = None if self.prefix is None else f"{self.prefix}.{len(self.tape.nodes) - self._first}.{op_type}"
        values = self.tape.op_multi_out(op_type, inputs, attributes, num_outputs=count, name=name)
        for index, value in enumerate(values if name is not None else ()):
            value.name = f"{name}.out" + (f".{index}" if index else "")
        return values

    def to_float(self, value: ir.Value) -> ir.Value:
        """The value as float32: itself, or a Cast of it where it is known to be of another type, or of no known one."""
        return value if value.dtype == ir.DataType.FLOAT else self.op("Cast", value, to=int(ir.DataType.FLOAT))
