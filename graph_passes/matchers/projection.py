"""Recognise a linear projection, walking backwards from its result.

Looked through on the way: a bias Add, Reshapes that regroup rows, and what takes the columns of a projection that is packed
with others (`packing`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from graph_passes.matchers.common import describe, keeps_last_axis
from graph_passes.matchers.packing import packed_part
from graph_passes.matchers.weights import (
    QUANTISED_OPS,
    Columns,
    MatrixSource,
    VectorSource,
    casts_floats,
    integer_product,
    matrix_source,
    rounds_values,
    vector_source,
)

_PASSED = ("Identity", "QuantizeLinear", "DequantizeLinear")
MOST_PASSED = 64
"""Nodes between a product and its result. Every product looks back, and none may look through all of a graph."""
MATMUL_OPS = ("MatMul", "Gemm", "FusedMatMul")


@dataclass(frozen=True)
class Projection:
    """x [.., in] times weight [in, out], plus bias [out]; `nodes` from the matrix product to the result."""

    x: ir.Value
    weight: MatrixSource
    bias: VectorSource | None
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True)
class NoProjection:
    """Why a value is not a projection's; `linear`: it does come from a matrix product."""

    reason: str
    linear: bool


def match_product(node: ir.Node) -> Projection | str:
    """Read one matrix product node with a constant right operand, or say why it is none."""
    if node.op_type in QUANTISED_OPS:
        return f"quantised weights in {describe(node)}"
    if node.op_type not in MATMUL_OPS:
        return f"{describe(node)} is not a matrix product"
    x = node.inputs[0]
    if x is None:
        return f"{describe(node)} has no input"
    attributes = node.attributes
    bias = None
    transposed = False
    if node.op_type != "MatMul":
        if attributes.get_int("transA", 0) or attributes.get_int("transBatchA", 0) or attributes.get_int("transBatchB", 0):
            return f"{describe(node)} transposes its first operand or its batch"
        if attributes.get_float("alpha", 1.0) != 1.0:
            return f"{describe(node)} has alpha {attributes.get_float('alpha', 1.0)}"
        transposed = bool(attributes.get_int("transB", 0))
    weight = matrix_source(node.inputs[1], transposed)
    if isinstance(weight, str):
        return f"{weight} ({describe(node)})"
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        if attributes.get_float("beta", 1.0) != 1.0:
            return f"{describe(node)} has beta {attributes.get_float('beta', 1.0)}"
        bias = vector_source(node.inputs[2])
        if bias is None:
            return f"the bias of {describe(node)} is not a constant vector"
    if bias is not None and bias.size != weight.shape[1]:
        return f"the bias of {describe(node)} has {bias.size} values for {weight.shape[1]} columns"
    return Projection(x, weight, bias, (node,))


def match_projection(value: ir.Value) -> Projection | NoProjection:
    """Walk back from a projection's result to its matrix product."""
    passed: list[ir.Node] = []
    columns: Columns | None = None
    bias: VectorSource | None = None
    while True:
        node = value.producer()
        if node is None:
            return NoProjection(f"{value.name!r} is not the result of a matrix product", linear=False)
        if (integers := integer_product(node)) is not None:
            return NoProjection(f"quantised weights in {describe(integers)}", linear=True)
        if node.op_type in MATMUL_OPS or (node.op_type in QUANTISED_OPS and not rounds_values(node)):
            break
        previous: ir.Value | None = None
        nodes: tuple[ir.Node, ...] = (node,)
        if node.op_type in _PASSED or casts_floats(node) or (node.op_type == "Reshape" and keeps_last_axis(node)):
            previous = node.inputs[0]
        elif node.op_type == "Add":
            for index in (0, 1):
                found = vector_source(node.inputs[1 - index])
                if found is not None and found.size > 1:
                    if bias is not None:
                        return NoProjection(f"{describe(node)} adds a second bias", linear=True)
                    bias, previous = replace(found, columns=columns), node.inputs[index]
        elif (part := packed_part(node, value)) is not None:
            if columns is not None:
                return NoProjection(f"{describe(node)} takes a part of a part of a packed projection", linear=True)
            columns, previous = part.columns, part.source
            nodes = part.nodes
        if previous is None:
            return NoProjection(f"{value.name!r} is the result of {describe(node)}, not of a projection", linear=False)
        passed.extend(nodes)
        value = previous
        if len(passed) > MOST_PASSED:
            return NoProjection(f"{value.name!r} is more than {MOST_PASSED} nodes away from a matrix product", linear=False)
    product = match_product(node)
    if isinstance(product, str):
        return NoProjection(product, linear=True)
    rounding = next((each for each in passed if each.op_type == "QuantizeLinear"), None)
    if rounding is not None:
        return NoProjection(f"quantised activations: {describe(rounding)} rounds them", linear=True)
    if product.bias is not None:
        if bias is not None:
            return NoProjection(f"{describe(node)} has a bias and another one is added", linear=True)
        bias = replace(product.bias, columns=columns)
    width = product.weight.shape[1]
    if columns is not None and not 0 <= columns.start <= columns.stop <= width:
        return NoProjection(f"columns {columns.start} to {columns.stop} are taken of {width} ({describe(node)})", linear=True)
    weight = replace(product.weight, columns=columns)
    if bias is not None and bias.size != weight.shape[1]:
        return NoProjection(f"a bias of {bias.size} values is added to {weight.shape[1]} columns", linear=True)
    return Projection(product.x, weight, bias, (*product.nodes, *reversed(passed)))
