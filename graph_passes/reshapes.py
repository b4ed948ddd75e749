"""Remove the detours that `ort_fusions` leaves around attention: heads merged and split again, transposed there and back."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graph_passes.matchers.common import fixed_size
from graph_passes.matchers.weights import constant_array


class RemoveHeadReshapes(ir.passes.InPlacePass):
    """Rewrite, with the same numbers:

    * `Reshape(Reshape(x [b, s, h, d], [0, 0, h d]), [0, 0, h, d])` to `x`,
    * `Transpose(Transpose(x, p), q)` to one `Transpose`, or to `x` where the two cancel.

    In decode each of these copies the whole cache of a layer. A second run changes nothing.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply both rules to the main graph."""
        modified = False
        for node in list(model.graph):
            # Again, while the node stays: what it now reads may be a Transpose that is an output too, and so was not merged.
            while (source := _detour(node)) is not None:
                modified = True
                if isinstance(source, ir.Value):
                    ir.convenience.replace_all_uses_with(node.outputs[0], source)
                    break
                inner, order = source
                node.replace_input_with(0, inner)
                node.attributes["perm"] = ir.AttrInt64s("perm", order)
        if modified:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """No such pair is left, but where the second node gives an output of the graph."""
        left = next((node for node in model.graph if _detour(node) is not None), None)
        if left is not None:
            raise ir.passes.PostconditionError(f"node {left.name!r} undoes what the one before it did")


def _detour(node: ir.Node) -> ir.Value | tuple[ir.Value, list[int]] | None:
    """What the node and the one before it come to together; None if they are not such a pair, or their result is an output."""
    source = _merged_and_split(node) or _transposed_twice(node)
    return None if source is None or node.outputs[0].is_graph_output() else source


def _merged_and_split(node: ir.Node) -> ir.Value | None:
    """x, if the node splits what was merged from x's last two axes."""
    first = _reshape_source(node)
    inner = first.producer() if first is not None else None
    if inner is None:
        return None
    x = _reshape_source(inner)
    if x is None or x.shape is None or len(x.shape) != 4:
        return None
    heads, width = fixed_size(x.shape[2]), fixed_size(x.shape[3])
    if heads is None or width is None:
        return None
    if _keeps_rows(inner, [heads * width]) and _keeps_rows(node, [heads, width]):
        return x
    return None


def _reshape_source(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if node.op_type == "Reshape" and node.domain == "" else None


def _keeps_rows(node: ir.Node, tail: Sequence[int]) -> bool:
    """Whether a Reshape copies the first two axes (0) and makes `tail` of the rest (-1 may stand for one of it)."""
    allow_zero = node.attributes.get("allowzero")
    if allow_zero is not None and allow_zero.as_int() != 0:
        return False
    shape = constant_array(node.inputs[1])
    if shape is None or shape.ndim != 1 or len(shape) != 2 + len(tail):
        return False
    rest = shape[2:].tolist()
    return shape[:2].tolist() == [0, 0] and all(found in (-1, wanted) for found, wanted in zip(rest, tail, strict=True))


def _transposed_twice(node: ir.Node) -> ir.Value | tuple[ir.Value, list[int]] | None:
    """What two transposes in a row come to: their source, or their source and one order."""
    outer = _order(node)
    source = node.inputs[0] if node.inputs else None
    inner_node = source.producer() if source is not None else None
    inner = _order(inner_node) if inner_node is not None else None
    if outer is None or inner is None or inner_node is None or len(inner) != len(outer):
        return None
    x = inner_node.inputs[0]
    if x is None:
        return None
    order = [inner[axis] for axis in outer]
    return x if order == list(range(len(order))) else (x, order)


def _order(node: ir.Node) -> list[int] | None:
    if node.op_type != "Transpose" or node.domain != "" or "perm" not in node.attributes:
        return None
    order = list(node.attributes["perm"].as_ints())
    return order if sorted(order) == list(range(len(order))) else None
