"""Experts merged into one FFN for each segment (arXiv 2405.03133), as ordinary ONNX nodes around the op.

A segment of a sequence is its dense rows (load = +inf) of one run of the graph. They run the op, which is the dense FFN; under
an `If`, so that other runs pay nothing, the FFN's weights are merged by a router on their mean x, and returned as state. A row
with a finite load runs the merged FFN of the segment before. A sequence that had no segment yet runs dense.

Notation: d `hidden_size`, n input rows a neuron (2 gated, 1 plain), E experts of g = f / E neurons, d' = d, or d + 1 with
biases: a neuron's input bias is kept as one more weight, on an input that is 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graph_passes.emit import Emitter, Initializer
from graph_passes.function_body import emit_activation
from graph_passes.op import SparseFFNAttributes
from graph_passes.router import Router
from graph_passes.router_nodes import write_router


class _Emitter(Emitter):
    """One whose constants are the graph's, named by their values."""

    def __init__(self, prefix: str, initializer: Initializer, tape: ir.tape.Tape | None = None) -> None:
        super().__init__(prefix, tape)
        self.initializer = initializer

    def floats(self, value: float) -> ir.Value:
        return self.initializer(f"merge.float.{value!r}", np.array(value, dtype=np.float32))

    def ints(self, *values: int) -> ir.Value:
        return self.initializer(f"merge.ints.{'_'.join(map(str, values))}", np.array(values, dtype=np.int64))

    def either(
        self, condition: ir.Value, then: _Emitter, then_values: list[ir.Value], other: _Emitter, values: list[ir.Value]
    ) -> list[ir.Value]:
        """An `If` with these branches, and its outputs."""
        branches = [
            ir.Graph([], results, nodes=emitter.tape.nodes, name=emitter.prefix)
            for emitter, results in ((then, then_values), (other, values))
        ]
        made = self.several("If", len(values), condition, then_branch=branches[0], else_branch=branches[1])
        for index, value in enumerate(made):
            node = value.producer()
            assert node is not None
            value.name = f"{node.name}.out.{index}"
        return list(made)


@dataclass(frozen=True)
class MergeRows:
    """What all layers share: which rows [batch, sequence] run the merged FFN, and are a segment; whether there are any (bool
    scalars); the load that the op sees, float32; and the batch size as a number that no optimiser knows, times 0."""

    merged: ir.Value
    segment: ir.Value
    any_merged: ir.Value
    any_segment: ir.Value
    op_load: ir.Value
    zero: ir.Value


@dataclass(frozen=True)
class MergeState:
    """A layer's merged FFN, float32: `w_in` [batch, g n, d'] and `w_out` [batch, g, d]."""

    w_in: ir.Value
    w_out: ir.Value


def state_shapes(attributes: SparseFFNAttributes, width: int, hidden_size: int, experts: int) -> tuple[list[int], list[int]]:
    """The shapes of a layer's `MergeState` without the batch."""
    granule, inputs = width // experts, 2 if attributes.gated else 1
    return [granule * inputs, hidden_size + attributes.has_bias], [granule, hidden_size]


def emit_rows(load: ir.Value, past: MergeState, initializer: Initializer, tape: ir.tape.Tape) -> MergeRows:
    """Write the nodes that all layers share.

    Args:
        load: float32 [batch, sequence].
        past: of the first layer; all layers have their segments in the same runs, so one tells whether there was any.
    """
    emitter = _Emitter("merge.rows", initializer, tape)
    op, ints, floats = emitter.op, emitter.ints, emitter.floats
    segment = op("IsInf", load, detect_negative=0, detect_positive=1)
    padding = op("IsInf", load, detect_negative=1, detect_positive=0)
    # A state begins at zero, and merged weights are not all zero: one row of it tells.
    first = op("Abs", op("Slice", past.w_in, ints(0), ints(1), ints(1)))
    known = op("Greater", op("ReduceMax", first, ints(2), keepdims=0), floats(0.0))
    dense = op("Or", segment, op("IsNaN", load))
    merged = op("And", op("Not", op("Or", dense, padding)), known)
    skipped = op("Or", merged, padding)
    op_load = op("Where", skipped, floats(float("-inf")), floats(float("inf")))
    op_load.type, op_load.shape = ir.TensorType(ir.DataType.FLOAT), load.shape
    zero = op("Mul", op("Shape", load, start=0, end=1), ints(0))

    def some(rows: ir.Value) -> ir.Value:
        most = op("ReduceMax", op("Cast", rows, to=int(ir.DataType.INT32)), keepdims=0)
        return op("Cast", most, to=int(ir.DataType.BOOL))

    return MergeRows(merged, segment, some(merged), some(segment), op_load, zero)


def emit_merged(
    x: ir.Value,
    y: ir.Value,
    active: ir.Value | None,
    rows: MergeRows,
    past: MergeState,
    down_bias: ir.Value | None,
    attributes: SparseFFNAttributes,
    dtype: ir.DataType,
    granule: int,
    name: str,
    initializer: Initializer,
    tape: ir.tape.Tape,
) -> tuple[ir.Value, ir.Value | None]:
    """Put the merged FFN's result in the place of the op's for the rows that run it.

    Args:
        x, y: the op's, [batch, sequence, d] of type `dtype`.
        active: int32 [batch, sequence], the op's count, or None.
        granule: g.

    Returns:
        y, and the count.
    """
    outer = _Emitter(name, initializer, tape)
    then, other = (_Emitter(f"{name}.{part}", initializer) for part in ("then", "else"))
    value = then.to_float(x)
    if attributes.has_bias:
        value = then.op("Pad", value, then.ints(0, 0, 0, 0, 0, 1), then.floats(1.0))
    # ONNX Runtime multiplies by a transposed matrix without making it.
    value = then.op("MatMul", value, then.op("Transpose", past.w_in, perm=[0, 2, 1]))
    if attributes.gated:
        pairs = then.op("Reshape", value, then.ints(0, 0, granule, 2))
        zero, one = (then.initializer(f"merge.index.{i}", np.array(i, dtype=np.int64)) for i in (0, 1))
        gate = emit_activation(then.op, then.floats, attributes.activation, then.op("Gather", pairs, zero, axis=-1))
        value = then.op("Mul", gate, then.op("Gather", pairs, one, axis=-1))
    else:
        value = emit_activation(then.op, then.floats, attributes.activation, value)
    value = then.op("MatMul", value, past.w_out)
    if down_bias is not None:
        value = then.op("Add", value, down_bias)
    if dtype != ir.DataType.FLOAT:
        value = then.op("Cast", value, to=int(dtype))
    chosen = then.op("Where", then.op("Unsqueeze", rows.merged, then.ints(-1)), value, y)
    (result,) = outer.either(rows.any_merged, then, [chosen], other, [other.op("Identity", y)])
    count = None
    if active is not None:
        ran = initializer(f"merge.count.{granule}", np.array(granule, dtype=np.int32))
        count = outer.op("Where", rows.merged, ran, active)
    return result, count


def emit_merge(
    x: ir.Value,
    rows: MergeRows,
    past: MergeState,
    router: Router,
    weights: dict[str, ir.Value],
    attributes: SparseFFNAttributes,
    shapes: tuple[list[int], list[int]],
    name: str,
    initializer: Initializer,
    tape: ir.tape.Tape,
) -> MergeState:
    """Merge a layer's experts for the sequences that have a segment in this run; others keep what they had.

    Returns:
        The new state: empty (no sequences) if the run has no segment at all, so that nothing is copied; the
        runtime keeps the old one then.
    """
    outer = _Emitter(name, initializer, tape)
    then, other = (_Emitter(f"{name}.{part}", initializer) for part in ("then", "else"))
    op = then.op
    # Padding may hold NaN, which 0 does not remove.
    kept = op("Where", op("Unsqueeze", rows.segment, then.ints(-1)), then.to_float(x), then.floats(0.0))
    count = op("ReduceSum", op("Cast", rows.segment, to=int(ir.DataType.FLOAT)), then.ints(1), keepdims=1)
    mean = op("Div", op("ReduceSum", kept, then.ints(1), keepdims=0), op("Max", count, then.floats(1.0)))
    mean.type = ir.TensorType(ir.DataType.FLOAT)
    scoring = replace(router, scale=1.0, dense_rows="scores")
    routing = f"{name}.router"
    share = write_router(scoring, mean, mean, routing, initializer, Emitter(routing, then.tape))
    experts = router.granules
    # ONNX Runtime would keep a reshaped copy of constant weights; it can't tell that this shape is constant.
    axis = op("Add", rows.zero, then.ints(experts))

    def by_expert(value: ir.Value, *rest: int) -> ir.Value:
        return op("Reshape", value, op("Concat", axis, then.ints(*rest), axis=0))

    stored = then.to_float(by_expert(weights["w_in"], -1, shapes[1][1]))
    if attributes.has_bias:
        biases = [weights[key] for key in ("gate_bias", "up_bias") if key in weights]
        values = np.stack([_numpy(bias) for bias in biases], axis=1).reshape(experts, -1, 1)
        stored = op("Concat", stored, initializer(f"{name}.bias", values), axis=-1)
    flat = op("Reshape", stored, then.ints(0, -1))
    w_in = op("Reshape", op("MatMul", share, flat), then.ints(0, *shapes[0]))
    scaled = op("Mul", share, then.floats(router.scale))
    w_out = op("MatMul", scaled, then.to_float(by_expert(weights["w_out"], -1)))
    w_out = op("Reshape", w_out, then.ints(0, *shapes[1]))
    new = op("Unsqueeze", op("Greater", count, then.floats(0.0)), then.ints(-1))
    made = [op("Where", new, w_in, past.w_in), op("Where", new, w_out, past.w_out)]
    empty = [other.op("ConstantOfShape", other.ints(0, *shape)) for shape in shapes]
    return MergeState(*outer.either(rows.any_segment, then, made, other, empty))


def _numpy(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float32)
