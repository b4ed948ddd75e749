"""Let nodes that read the shape of a value read it from where the value gets it.

PyTorch's `x.view(*h.shape[:-1], n)` after a layer leaves a Shape node that reads a hidden value h, which then has a user
outside the layer, and the layer could not be replaced. Elementwise operators do not change a shape, and the shape of a
Reshape's result is its second operand.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.rules.weights import constant_array, is_constant

_UNARY = ("Relu", "Sigmoid", "Tanh", "Erf", "Gelu", "FastGelu", "QuickGelu", "Neg", "Abs", "Exp", "Sqrt", "Cast", "Identity")
_BINARY = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min")
_PARTS = ("Slice", "Gather", "Unsqueeze", "Squeeze", "Identity", "Cast")
"""Operators that take some of the numbers of a shape."""
_DEPTH = 64


class HoistShapeReads(ir.passes.InPlacePass):
    """Move Shape nodes up over elementwise operators, and put the target of a Reshape in their place."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Look at every Shape node of the main graph once."""
        changed = False
        for node in list(model.graph):
            if node.op_type != "Shape" or node.domain or node.inputs[0] is None or node.outputs[0].is_graph_output():
                continue
            source = _origin(node.inputs[0], {}, 0)
            reshape = source.producer()
            if reshape is not None and reshape.op_type == "Reshape" and not node.attributes and _positive(reshape.inputs[1]):
                assert reshape.inputs[1] is not None
                ir.convenience.replace_all_uses_with(node.outputs[0], reshape.inputs[1])
                changed = True
            elif source is not node.inputs[0]:
                node.replace_input_with(0, source)
                changed = True
        return ir.passes.PassResult(model, changed)


def _origin(value: ir.Value, known: dict[ir.Value, ir.Value], depth: int) -> ir.Value:
    """The earliest value that surely has the same shape."""
    if value not in known:
        known[value] = value
        node = value.producer()
        if node is not None and depth < _DEPTH:
            operands = _shaping_operands(node)
            origins = {_origin(operand, known, depth + 1) for operand in operands}
            if len(origins) == 1:
                known[value] = origins.pop()
    return known[value]


def _shaping_operands(node: ir.Node) -> list[ir.Value]:
    """The operands whose shape the node's result has if they all have the same; none if it is another operator."""
    if node.op_type in _UNARY:
        return [value for value in node.inputs[:1] if value is not None]
    if node.op_type not in _BINARY:
        return []
    operands = [value for value in node.inputs if value is not None]
    shaping = [value for value in operands if not any(_adds_nothing(value, other) for other in operands if other is not value)]
    return shaping


def _adds_nothing(value: ir.Value, other: ir.Value) -> bool:
    """Whether a constant operand is broadcast to the other: one number, or a vector as long as the other's last axis."""
    array = constant_array(value)
    dims = tuple(array.shape) if array is not None else None
    if dims is None and is_constant(value) and value.shape is not None and value.shape.is_static():
        dims = value.shape.numpy()
    if dims is None or len(dims) > 1:
        return False
    if dims in ((), (1,)):
        return len(dims) == 0 or (other.shape is not None and len(other.shape) > 0)
    return other.shape is not None and len(other.shape) > 0 and other.shape[-1] == dims[0]


def _positive(target: ir.Value | None) -> bool:
    """Whether a target shape is made of positive constants and numbers of other shapes: no -1 to infer, no 0 to copy."""
    if target is None:
        return False
    if (known := constant_array(target)) is not None:
        return bool((known > 0).all())
    node = target.producer()
    if node is None:
        return False
    if node.op_type == "Shape":
        return True
    if node.op_type in _PARTS:
        return _positive(node.inputs[0])
    return node.op_type == "Concat" and all(_positive(value) for value in node.inputs)
