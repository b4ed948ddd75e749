"""Let nodes that read the shape of a value read it from where the value gets it.

PyTorch's `x.view(*h.shape[:-1], n)` after a layer leaves a Shape node that reads a hidden value h, which then has a user
outside the layer, and the layer could not be replaced. Elementwise operators do not change a shape, and the shape of a
Reshape's result is its second operand.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.matchers.weights import constant_array, is_constant

_UNARY = ("Relu", "Sigmoid", "Tanh", "Erf", "Gelu", "FastGelu", "QuickGelu", "Neg", "Abs", "Exp", "Sqrt", "Cast", "Identity")
_BINARY = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min")
_PARTS = ("Slice", "Gather", "Unsqueeze", "Squeeze", "Identity", "Cast")
"""Operators that take some of the numbers of a shape."""


class HoistShapeReads(ir.passes.InPlacePass):
    """Move Shape nodes up over elementwise operators, and put the target of a Reshape in their place."""

    def requires(self, model: ir.Model) -> None:
        """The nodes are in an order in which they can run: what is known of a value is known before the nodes that read it."""
        seen: set[ir.Node] = set()
        for node in model.graph:
            for value in node.inputs:
                producer = None if value is None else value.producer()
                if producer is not None and producer.graph is model.graph and producer not in seen:
                    raise ir.passes.PreconditionError(f"{node.name!r} stands before {producer.name!r}, whose result it reads")
            seen.add(node)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Look at every node of the main graph once."""
        changed = False
        origins: dict[ir.Value, ir.Value] = {}
        positive: dict[ir.Value, bool] = {}
        for node in list(model.graph):
            _note_origin(node, origins)
            _note_positive(node, positive)
            if node.op_type != "Shape" or node.domain or node.inputs[0] is None or node.outputs[0].is_graph_output():
                continue
            source = origins.get(node.inputs[0], node.inputs[0])
            reshape = source.producer()
            target = reshape.inputs[1] if reshape is not None and reshape.op_type == "Reshape" and not reshape.domain else None
            if target is not None and not node.attributes and _is_positive(target, positive):
                ir.convenience.replace_all_uses_with(node.outputs[0], target)
                changed = True
            elif source is not node.inputs[0]:
                node.replace_input_with(0, source)
                changed = True
        return ir.passes.PassResult(model, changed)


def _note_origin(node: ir.Node, known: dict[ir.Value, ir.Value]) -> None:
    """Note the earliest value that surely has the shape of the node's result; `known` has those of the nodes before it."""
    origins = {known.get(operand, operand) for operand in _shaping_operands(node)}
    if len(origins) == 1:
        known[node.outputs[0]] = origins.pop()


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


def _note_positive(node: ir.Node, known: dict[ir.Value, bool]) -> None:
    """Note whether the node's result is made of positive constants and numbers of shapes: no -1 to infer, no 0 to copy."""
    if node.op_type == "Shape":
        known[node.outputs[0]] = True
    elif node.op_type in _PARTS:
        known[node.outputs[0]] = _is_positive(node.inputs[0], known)
    elif node.op_type == "Concat":
        known[node.outputs[0]] = all(_is_positive(value, known) for value in node.inputs)


def _is_positive(value: ir.Value | None, known: dict[ir.Value, bool]) -> bool:
    """Whether a target shape is a positive constant, or known to be made of such."""
    array = constant_array(value)
    return bool((array > 0).all()) if array is not None else value is not None and known.get(value, False)
