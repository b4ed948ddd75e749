"""Give attention in 16 bits its scale back: the exporter rounds the root of it, and applies that twice."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graph_passes.emit import initializer, result

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class ExactAttentionScale(ir.passes.InPlacePass):
    """Rewrite `MatMul(Mul(q, r), Mul(k, r))` with a 16-bit constant r to `MatMul(Cast(Mul(Cast(q, float32), s)), k)`.

    s is the one of `scales` whose root is r after rounding, or else r * r: then the numbers stay what they were, but for the
    rounding of products. The keys, which are the whole cache, are no longer multiplied. Graphs in float32 are not changed, and
    a second run changes nothing.

    Args:
        scales: of the model's attention layers, such as 1 / sqrt(head size).
    """

    def __init__(self, scales: Collection[float]) -> None:
        super().__init__()
        self.scales = sorted({scale for scale in scales if scale > 0 and math.isfinite(scale)})

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rule to the main graph."""
        modified = False
        for node in list(model.graph):
            found = _scaled_twice(node)
            if found is None:
                continue
            (source, root, dtype), keys = found
            scaled = self._scale(model.graph, node, source, root, dtype)
            node.replace_input_with(0, scaled)
            node.replace_input_with(1, keys)
            modified = True
        if modified:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """No product is left whose two sides are multiplied by one 16-bit constant."""
        left = next((node for node in model.graph if _scaled_twice(node) is not None), None)
        if left is not None:
            raise ir.passes.PostconditionError(f"the factors of {left.name!r} are both still scaled")

    def _scale(self, graph: ir.Graph, node: ir.Node, source: ir.Value, root: float, dtype: ir.DataType) -> ir.Value:
        """Nodes before `node` that multiply `source` by the scale in float32, and their result."""
        rounded = {scale: float(np.array(math.sqrt(scale)).astype(dtype.numpy())) for scale in self.scales}
        exact = next((scale for scale, value in rounded.items() if value == root), root * root)
        name = f"attention_scale.{exact:.9g}"
        factor = initializer(graph, name, np.array(exact, np.float32))
        prefix, tape = f"{node.name}.scale", ir.tape.Tape()

        def op(part: str, op_type: str, inputs: list[ir.Value], kind: ir.DataType, **attributes: int) -> ir.Value:
            named = f"{prefix}.{part}"
            made = result(f"{named}.out", kind, source.shape)
            return tape.op(op_type, inputs, attributes, name=named, output=made)

        wide = op("wide", "Cast", [source], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
        product = op("product", "Mul", [wide, factor], ir.DataType.FLOAT)
        narrow = op("narrow", "Cast", [product], dtype, to=int(dtype))
        graph.insert_before(node, tape.nodes)
        return narrow


def _scaled_twice(node: ir.Node) -> tuple[tuple[ir.Value, float, ir.DataType], ir.Value] | None:
    """((q, r, type of r), k) of `MatMul(Mul(q, r), Mul(k, r))`, or None."""
    if node.op_type != "MatMul" or node.domain != "":
        return None
    query, keys = (_scaled(value) for value in node.inputs)
    return (query, keys[0]) if query is not None and keys is not None and query[1] == keys[1] else None


def _scaled(value: ir.Value | None) -> tuple[ir.Value, float, ir.DataType] | None:
    """(x, r, type of r) of `Mul(x, r)` with a 16-bit scalar constant r, or None."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Mul" or node.domain != "":
        return None
    for x, factor in (node.inputs, tuple(reversed(node.inputs))):
        tensor = factor.const_value if factor is not None else None
        if x is not None and tensor is not None and tensor.size == 1 and tensor.dtype in NARROW:
            return x, float(tensor.numpy().reshape(()).astype(np.float32)), tensor.dtype
    return None
