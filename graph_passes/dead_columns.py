"""Take the columns that nothing reads any more out of a packed projection.

`ort_fusions` packs projections of one x into one product followed by a Split, those of attention and FFN together where both
start from one norm (GPT-J, Cohere). When the FFN has been rewritten, its part of the product would still be computed, and its
weights be stored twice.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.emit import initializer
from graph_passes.matchers.packing import split_widths
from graph_passes.matchers.weights import is_constant
from graph_passes.repack import free_unused


class DropDeadColumns(ir.passes.InPlacePass):
    """Narrow `Split(MatMul(x, W) [+ b])` where results of the Split have no user.

    The Split splits the last axis, W is a matrix that no other node reads, and so is the bias.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Look at every Split of the main graph."""
        changed = False
        for node in list(model.graph):
            changed |= _narrow(model.graph, node)
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """No such Split is left."""
        left = next((node for node in model.graph if _dead(node) is not None), None)
        if left is not None:
            raise ir.passes.PostconditionError(f"results of {left.name!r} have no user")


def _dead(split: ir.Node) -> tuple[list[int], list[bool], list[tuple[ir.Node, int]]] | None:
    """(widths of the results, which have a user, `_operands`) of a Split that can be narrowed; None for other nodes."""
    if split.op_type != "Split" or split.domain:
        return None
    widths = split_widths(split)
    used = [bool(output.uses()) or output.is_graph_output() for output in split.outputs]
    if widths is None or all(used) or not any(used):
        return None
    chain = _operands(split)
    return None if chain is None else (widths, used, chain)


def _narrow(graph: ir.Graph, split: ir.Node) -> bool:
    found = _dead(split)
    if found is None:
        return False
    widths, used, chain = found
    kept = np.concatenate([np.arange(start, start + width) for start, width in _spans(widths, used)])
    for node, index in chain:
        _take(graph, node, index, kept)
    alive = [output for output, live in zip(split.outputs, used, strict=True) if live]
    sizes = [width for width, live in zip(widths, used, strict=True) if live]
    # The product is narrower: shapes of what lies between say so.
    for node, _ in chain:
        _set_last(node.outputs[0], len(kept))
    source = split.inputs[0]
    assert source is not None
    if len(alive) == 1 and not alive[0].is_graph_output():
        ir.convenience.replace_all_uses_with(alive[0], source)
    else:
        parts = initializer(graph, f"{split.name}.sizes", np.array(sizes, dtype=np.int64))
        tape = ir.tape.Tape()
        made = tape.op_multi_out("Split", [source, parts], {"axis": -1}, num_outputs=len(sizes), name=split.name)
        for old, value in zip(alive, made, strict=True):
            value.name, value.type, value.shape = old.name, old.type, old.shape
            ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        graph.insert_before(split, tape.nodes)
    graph.remove(split, safe=True)
    return True


def _spans(widths: list[int], used: list[bool]) -> list[tuple[int, int]]:
    starts = np.cumsum([0, *widths[:-1]])
    return [(int(start), width) for start, width, live in zip(starts, widths, used, strict=True) if live]


def _operands(split: ir.Node) -> list[tuple[ir.Node, int]] | None:
    """The nodes with constant operands between the product and the Split, each with the operand's place; None if another
    node reads what would be narrowed."""
    found: list[tuple[ir.Node, int]] = []
    value = split.inputs[0]
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        node = value.producer()
        if node is None:
            return None
        constant = next((i for i, operand in enumerate(node.inputs) if operand is not None and is_constant(operand)), None)
        if node.op_type not in ("MatMul", "Add") or node.domain or constant is None:
            return None
        operand = node.inputs[constant]
        if operand is None or len(operand.uses()) != 1 or operand.shape is None:
            return None
        if node.op_type == "MatMul":
            return [*found, (node, 1)] if constant == 1 and len(operand.shape) == 2 else None
        if len(operand.shape) != 1:
            return None
        found.append((node, constant))
        value = node.inputs[1 - constant]
    return None


def _take(graph: ir.Graph, node: ir.Node, index: int, kept: np.ndarray) -> None:
    old = node.inputs[index]
    assert old is not None and old.const_value is not None
    whole, name = old.const_value, f"{old.name}.narrowed"

    def narrowed() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(whole.numpy()[..., kept]), name=name, dtype=whole.dtype)

    shape = ir.Shape([*whole.shape.numpy()[:-1], len(kept)])
    value = ir.val(name, const_value=ir.LazyTensor(narrowed, dtype=whole.dtype, shape=shape, name=name))
    graph.register_initializer(value)
    node.replace_input_with(index, value)
    free_unused(graph, iter([old]))


def _set_last(value: ir.Value, width: int) -> None:
    if value.shape is not None:
        value.shape = ir.Shape([*list(value.shape)[:-1], width])
