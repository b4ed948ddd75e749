"""Let a caller say of how many last positions it wants logits: a prompt needs one, and the head is a large product."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.emit import Emitter, initializer
from graph_passes.load_outputs import LOGITS
from graph_passes.matchers.projection import MATMUL_OPS
from graph_passes.quant.contract import DOMAIN as QUANT_DOMAIN
from graph_passes.quant.contract import OP_TYPE as QUANT_OP

KEPT_LOGITS = "logits_to_keep"
LOGITS_LENGTH = "logits_length"
"""The axis of logits whose length the caller chooses."""
MOST_STEPS = 16
_ROW_BY_ROW = ("Identity", "Cast", "Mul", "Div", "Tanh", "Add")
"""Between the head and the logits, on single numbers: factors and caps."""


class KeepLastLogits(ir.passes.InPlacePass):
    """Add an input `logits_to_keep`, int64 [1], and compute the logits of so many last positions only.

    Its value is 0 where it is not fed, and stands for all. A graph whose logits do not come from a product of rows
    [batch, tokens, width], and nothing but single numbers behind it, stays as it is. A second run changes nothing.
    """

    def requires(self, model: ir.Model) -> None:
        """The graph returns `logits`."""
        if not any(value.name == LOGITS for value in model.graph.outputs):
            raise ir.passes.PreconditionError(f"the graph has no output {LOGITS!r}")

    def ensures(self, model: ir.Model) -> None:
        """The input has a value of its own."""
        for value in model.graph.inputs:
            if value.name == KEPT_LOGITS and value.const_value is None:
                raise ir.passes.PostconditionError(f"the input {KEPT_LOGITS!r} has no value where it is not fed")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cut the rows before the head."""
        graph = model.graph
        logits = next(value for value in graph.outputs if value.name == LOGITS)
        head = _head(logits)
        if head is None or any(value.name == KEPT_LOGITS for value in graph.inputs):
            return ir.passes.PassResult(model, False)
        rows = head.inputs[0]
        assert rows is not None and rows.shape is not None
        kept = ir.val(KEPT_LOGITS, ir.DataType.INT64, [1], const_value=ir.Tensor(np.zeros(1, np.int64), name=KEPT_LOGITS))
        graph.inputs.append(kept)
        graph.register_initializer(kept)
        emit = Emitter(KEPT_LOGITS)
        # From -1 on for one position, from 0 on for all.
        start = emit.op("Neg", kept)
        end, axis = (
            initializer(graph, f"{KEPT_LOGITS}.{name}", np.array([number], np.int64))
            for name, number in (("end", 2**31 - 1), ("axis", 1))
        )
        cut = emit.op("Slice", rows, start, end, axis)
        batch, _, width = rows.shape
        cut.type, cut.shape = rows.type, ir.Shape([batch, LOGITS_LENGTH, width])
        graph.insert_before(head, emit.tape.nodes)
        head.replace_input_with(0, cut)
        _rename(head, batch)
        return ir.passes.PassResult(model, True)


def _head(logits: ir.Value) -> ir.Node | None:
    """The product that logits come from, if nothing else reads what lies between."""
    value = logits
    for _ in range(MOST_STEPS):
        node = value.producer()
        if (
            node is None
            or node.graph is None
            or (value is not logits and (value.is_graph_output() or len(list(value.uses())) != 1))
        ):
            return None
        if _is_product(node):
            return node if _has_rows(node.inputs[0]) and _has_rows(node.outputs[0]) and node.inputs[1] is not None else None
        if node.domain or node.op_type not in _ROW_BY_ROW:
            return None
        computed = [item for item in node.inputs if item is not None and item.producer() is not None]
        if len(computed) != 1 or any(_may_follow_rows(item) for item in node.inputs if item is not computed[0]):
            return None
        value = computed[0]
    return None


def _is_product(node: ir.Node) -> bool:
    if (node.domain, node.op_type) == (QUANT_DOMAIN, QUANT_OP):
        return True
    # A Gemm takes a table, in which rows of all sequences follow each other.
    transposed = node.attributes.get_int("transA", 0) or node.attributes.get_int("transBatchA", 0)
    constant = len(node.inputs) > 1 and node.inputs[1] is not None and node.inputs[1].producer() is None
    return node.op_type in MATMUL_OPS and node.op_type != "Gemm" and constant and not transposed


def _has_rows(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and len(value.shape) == 3


def _may_follow_rows(value: ir.Value | None) -> bool:
    """Whether a constant could have a number for each position: its axis before the last is longer than 1."""
    if value is None or (value.shape is None and value.const_value is None):
        return True
    dims = list(value.const_value.shape.numpy()) if value.const_value is not None else [0, 0]
    return any(size != 1 for size in dims[:-1])


def _rename(head: ir.Node, batch: int | ir.SymbolicDim) -> None:
    """Tell the new length of what follows."""
    queue = list(head.outputs)
    while queue:
        value = queue.pop()
        if value.shape is not None and len(value.shape) == 3:
            value.shape = ir.Shape([batch, LOGITS_LENGTH, value.shape[2]])
            queue.extend(output for use in value.uses() if use.node.op_type in _ROW_BY_ROW for output in use.node.outputs)
