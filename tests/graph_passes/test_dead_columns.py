"""Projections of the FFN that are packed with those of attention, as in parallel blocks."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from handmade import HIDDEN, WIDTH, Handmade, rewritten_alike

from graph_passes.dead_columns import DropDeadColumns

OTHER = 10


def _parallel(*, others: int = 1, bias: bool = True, gated: bool = True) -> ir.Model:
    """q (or q, k) and the FFN's projections in one product; y is what the FFN gives, and the others are outputs."""
    g = Handmade()
    widths = [OTHER] * others + [WIDTH] * (1 + gated)
    packed = g.matmul(g.x, g.weight("packed", HIDDEN, sum(widths)))
    if bias:
        packed = g.op("Add", packed, g.weight("bias", sum(widths)), shape=["b", "s", sum(widths)])
    sizes = g.const("sizes", np.array(widths))
    parts = g.tape.op_multi_out("Split", [packed, sizes], {"axis": -1}, num_outputs=len(widths))
    for index, (part, width) in enumerate(zip(parts, widths, strict=True)):
        part.name, part.shape, part.type = f"part{index}", ir.Shape(["b", "s", width]), ir.TensorType(ir.DataType.FLOAT)
    hidden = g.silu(parts[others])
    if gated:
        hidden = g.op("Mul", hidden, parts[others + 1])
    y = g.matmul(hidden, g.weight("down", WIDTH, HIDDEN), module="mlp.down_proj")
    return g.model(y, *(g.op("Neg", part, shape=["b", "s", OTHER]) for part in parts[:others]))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("others", [1, 2])
def test_the_layer_is_rewritten_and_its_columns_leave_the_product(others: int, bias: bool, gated: bool) -> None:
    before, model = (_parallel(others=others, bias=bias, gated=gated) for _ in range(2))
    match = rewritten_alike(before, model)
    assert (match.gated, match.has_bias) == (gated, bias)
    (product,) = (node for node in model.graph if node.op_type == "MatMul")
    assert product.inputs[1] is not None and product.inputs[1].shape == (HIDDEN, OTHER * others)
    assert sum(node.op_type == "Split" for node in model.graph) == (others > 1)
    # The packed weight is gone, not kept beside its parts.
    assert not {"packed", "bias"} & set(model.graph.initializers)


def test_nothing_is_dropped_that_is_read() -> None:
    model = _parallel()
    before = ir.to_proto(model).SerializeToString()
    assert not DropDeadColumns()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_a_weight_that_others_read_is_left() -> None:
    g = Handmade()
    weight = g.weight("packed", HIDDEN, 2 * OTHER)
    parts = g.tape.op_multi_out("Split", [g.matmul(g.x, weight)], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    for index, part in enumerate(parts):
        part.name, part.shape = f"part{index}", ir.Shape(["b", "s", OTHER])
    model = g.model(g.op("Neg", parts[0]), g.matmul(g.x, weight))
    assert not DropDeadColumns()(model).modified
