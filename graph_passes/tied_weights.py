"""Keep a matrix once that the graph has twice: as it is and transposed.

A model with tied embeddings looks tokens up in a matrix [V, d] and multiplies by the same one, transposed, in its last product.
An exporter writes both. For a vocabulary of 152 thousand and 1536 values a token that is 0.9 GB.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.matchers.weights import is_constant
from graph_passes.repack import free_unused

DOMAIN = "com.microsoft"
SMALLEST = 1 << 16
"""Elements; what a smaller matrix takes does not matter."""
ROWS_AT_ONCE = 4096


class ShareTransposed(ir.passes.InPlacePass):
    """`MatMul(x, W)` becomes `FusedMatMul(x, E, transB=1)` of ONNX Runtime where W is the transpose of an initializer E.

    ONNX Runtime packs E for the product as it would pack W, so the product itself is the same. What is in memory and on disk is
    one matrix, and a transpose of a large matrix is not made at all.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Look at every product of the main graph."""
        graph = model.graph
        products = [node for node in graph if _weight(node) is not None]
        changed = False
        for node in products:
            weight = _weight(node)
            assert weight is not None
            stored = _stored(graph, weight)
            if stored is None:
                continue
            tape = ir.tape.Tape()
            old = node.outputs[0]
            made = tape.op("FusedMatMul", [node.inputs[0], stored], {"transB": 1}, domain=DOMAIN, name=node.name)
            made.name, made.type, made.shape = old.name, old.type, old.shape
            made.metadata_props.update(old.metadata_props)
            tape.nodes[0].metadata_props.update(node.metadata_props)
            graph.insert_before(node, tape.nodes)
            ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            free_unused(graph, iter([weight]))
            graph.opset_imports.setdefault(DOMAIN, 1)
            changed = True
        return ir.passes.PassResult(model, changed)


def _weight(node: ir.Node) -> ir.Value | None:
    """The constant matrix that a MatMul alone multiplies by, if it is large."""
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
        return None
    weight = node.inputs[1]
    if weight is None or not is_constant(weight) or len(weight.uses()) != 1 or weight.is_graph_output():
        return None
    tensor = weight.const_value
    assert tensor is not None
    return weight if len(tensor.shape) == 2 and tensor.size >= SMALLEST and tensor.dtype == ir.DataType.FLOAT else None


def _stored(graph: ir.Graph, weight: ir.Value) -> ir.Value | None:
    """The initializer that tokens are looked up in, if it is the transpose of a weight."""
    tensor = weight.const_value
    assert tensor is not None
    wanted = tuple(reversed(tensor.shape.numpy()))
    for node in graph:
        value = node.inputs[0] if node.op_type == "Gather" else None
        if value is None or not is_constant(value):
            continue
        other = value.const_value
        assert other is not None
        same = other.dtype == tensor.dtype and tuple(other.shape.numpy()) == wanted
        if same and _is_transpose(other.numpy(), tensor.numpy()):
            return value
    return None


def _is_transpose(stored: np.ndarray, weight: np.ndarray) -> bool:
    turned = weight.T
    rows = range(0, len(stored), ROWS_AT_ONCE)
    return all(np.array_equal(stored[start : start + ROWS_AT_ONCE], turned[start : start + ROWS_AT_ONCE]) for start in rows)
