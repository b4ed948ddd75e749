"""Give attention in 16 bits its scale back: the exporter rounds the root of it, and applies that twice."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

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
            if node.op_type != "MatMul" or node.domain != "":
                continue
            query, keys = (_scaled(value) for value in node.inputs)
            if query is None or keys is None or query[1] != keys[1]:
                continue
            source, root, dtype = query
            scaled = self._scale(model.graph, node, source, root, dtype)
            node.replace_input_with(0, scaled)
            node.replace_input_with(1, keys[0])
            modified = True
        if modified:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)

    def _scale(self, graph: ir.Graph, node: ir.Node, source: ir.Value, root: float, dtype: ir.DataType) -> ir.Value:
        """Nodes before `node` that multiply `source` by the scale in float32, and their result."""
        rounded = {scale: float(np.array(math.sqrt(scale)).astype(dtype.numpy())) for scale in self.scales}
        exact = next((scale for scale, value in rounded.items() if value == root), root * root)
        name = f"attention_scale.{exact:.9g}"
        if name not in graph.initializers:
            constant = ir.Tensor(np.array(exact, np.float32), name=name)
            graph.register_initializer(
                ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]), const_value=constant)
            )
        prefix = f"{node.name}.scale"
        wide = ir.node("Cast", [source], {"to": int(ir.DataType.FLOAT)}, name=f"{prefix}.wide")
        product = ir.node("Mul", [wide.outputs[0], graph.initializers[name]], name=f"{prefix}.product")
        narrow = ir.node("Cast", [product.outputs[0]], {"to": int(dtype)}, name=f"{prefix}.narrow")
        for made, kind in ((wide, ir.DataType.FLOAT), (product, ir.DataType.FLOAT), (narrow, dtype)):
            made.outputs[0].name = f"{made.name}.out"
            made.outputs[0].type = ir.TensorType(kind)
            made.outputs[0].shape = None if source.shape is None else source.shape.copy()
        graph.insert_before(node, [wide, product, narrow])
        return narrow.outputs[0]


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
