"""How large the values of a graph get that its constants decide, found before anything computes them.

A shape costs nothing to write: an Expand to 10^12 numbers is a line, and forty Concats of a list with itself are 10^12 sizes.
What prepares a graph would compute them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from clada_export.errors import UnsupportedModelError
from clada_export.patches.onnxscript_folding import FoldConstants
from clada_export.source.onnx.functions import domain_of

MOST_LISTED = 100_000
"""Numbers of one list of sizes."""
MOST_LISTED_IN_ALL = 20_000_000
FOLDED_INPUT, FOLDED_OUTPUT = 8192, 512 * 512
"""Elements of one constant to fold: the optimizer's own bounds, which it looks at when it has the result."""
FOLDED_IN_ALL = 16_000_000
MOST_PIECES = 4096
"""Of a value that is taken apart."""
MOST_SUMMED = 1024
"""Names of sizes in one sum."""
LONGEST_LIST = 1 << 20
"""Numbers of a list that shape inference may follow; a vocabulary has fewer."""
SPARE_ELEMENTS = 1 << 28
"""Of a value that no input sizes: a mask of 16,384 positions, say. A value may also be twice as large as all weights."""

_SIZES = ("Add", "Sub", "Mul", "Cast", "Identity", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Abs", "CastLike")
"""Operators through which sizes are followed, by onnx or by the optimizer; and Concat and Gather, which make lists longer."""
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_FOLDED = {
    "Abs", "Acos", "Add", "And", "ArgMax", "ArgMin", "Asin", "Atan", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
    "BitwiseXor", "Cast", "CastLike", "Ceil", "Clip", "Compress", "Concat", "Cos", "CumSum", "Div", "Equal", "Erf",
    "Exp", "Expand", "EyeLike", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gemm", "Greater",
    "GreaterOrEqual", "Identity", "IsInf", "IsNaN", "Less", "LessOrEqual", "Log", "MatMul", "Max", "Mean", "Min", "Mod",
    "Mul", "Neg", "NonZero", "Not", "OneHot", "Or", "Pad", "Pow", "Range", "Reciprocal", "ReduceL1", "ReduceL2",
    "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Round",
    "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax", "Sqrt", "Squeeze",
    "Sub", "Sum", "Tan", "Tanh", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
}  # fmt: skip
"""What is computed ahead of time: what exporters leave of shapes, masks and rotary embeddings."""
_UNSIZED = ("NonZero", "Compress", "Slice")
"""Operators whose result is no larger than a small multiple of what they read, though its shape may be unknown."""


def check_lists(model: ir.Model, path: Path) -> None:
    """Bound the lists of sizes that shape inference carries along.

    Args:
        model: whose nodes are in an order in which they can run.

    Raises:
        UnsupportedModelError: very long ones; names the node.
    """
    sizes: dict[ir.Value, int] = {}
    total = 0
    for node in model.graph.all_nodes():
        given = [sizes[value] if value in sizes else _listed(value.const_value) for value in node.inputs if value is not None]
        if node.op_type == "Constant":
            found = max(map(_constant, node.attributes.values()), default=1)
        elif node.op_type == "Concat":
            found = sum(given)
        elif node.op_type == "Gather" and len(given) == 2:
            found = given[1]
        else:
            found = max(given, default=1) if node.op_type in _SIZES else 1
        total += found if found > 1 else 0
        if (found > MOST_LISTED and node.op_type == "Concat") or total > MOST_LISTED_IN_ALL:
            raise UnsupportedModelError(
                f"{path}: {_shown(node)} makes a list of {found:.3g} sizes ({total:.3g} in all so far); at most {MOST_LISTED} "
                f"in one and {MOST_LISTED_IN_ALL} in all are supported"
            )
        sizes.update(dict.fromkeys(node.outputs, found))


def _listed(tensor: ir.TensorProtocol | None) -> int:
    """How many sizes a constant may list."""
    return tensor.size if tensor is not None and tensor.dtype in _INTEGERS and len(tensor.shape) < 2 else 1


def _constant(attribute: ir.Attr) -> int:
    if attribute.type == ir.AttributeType.TENSOR:
        return _listed(attribute.as_tensor())
    return len(attribute.as_ints()) if attribute.type == ir.AttributeType.INTS else 1


def fold_constants(model: ir.Model, path: Path) -> None:
    """Compute what follows from constants, and infer shapes on the way, as onnxscript's optimizer does; within bounds.

    Raises:
        UnsupportedModelError: what it would have to follow gets very long.
        Exception: whatever the optimizer and NumPy raise on a graph that makes no sense.
    """
    _BoundedFold(path)(model)


class _BoundedFold(FoldConstants):
    """The optimizer's pass, which looks at sizes only after it has computed what they are of."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            shape_inference=True,
            input_size_limit=FOLDED_INPUT,
            output_size_limit=FOLDED_OUTPUT,
            should_fold=self._fits,
        )
        self._path = path
        self._left = FOLDED_IN_ALL
        self._summed: dict[ir.Value, int] = {}

    def process_node(self, node: ir.Node, *arguments: Any, **keywords: Any) -> Any:
        """Bound what the optimizer has rules for; everything else comes to `_fits`."""
        self._bound(node)
        return super().process_node(node, *arguments, **keywords)

    def _bound(self, node: ir.Node) -> None:
        if domain_of(node.domain) != "":
            return
        inputs = [value for value in node.inputs if value is not None]
        pieces = 0
        if node.op_type == "SplitToSequence":
            pieces = max((size for value in inputs for size in _known(value)), default=0)
        elif node.op_type == "Gather" and len(inputs) == 2 and inputs[0] in self._summed:
            pieces = inputs[1].const_value.size if inputs[1].const_value is not None else 0
        if pieces > MOST_PIECES:
            raise UnsupportedModelError(
                f"{self._path}: {_shown(node)} makes {pieces} pieces of a value; at most {MOST_PIECES} are supported"
            )
        given = [self._summed.get(value, 0) for value in inputs]
        found = 0
        if node.op_type == "Shape":
            found = sum(len(str(size)) for size in (inputs[0].shape or ())) if inputs else 0
        elif node.op_type in ("Add", "Concat"):
            found = sum(given)
        elif node.op_type in _SIZES or node.op_type == "Gather":
            found = max(given, default=0)
        if found > 8 * MOST_SUMMED:
            raise UnsupportedModelError(
                f"{self._path}: {_shown(node)} adds up very many sizes that are names; at most {MOST_SUMMED} are supported"
            )
        if found:
            self._summed.update(dict.fromkeys(node.outputs, found))

    def _fits(self, node: ir.Node) -> bool | None:
        """False for what is not to be computed; None for what the optimizer may compute by its own rules."""
        if domain_of(node.domain) != "" or node.op_type not in _FOLDED or len(node.outputs) != 1:
            return False
        tensors = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
        if any(tensor.dtype == ir.DataType.STRING for tensor in tensors):
            return False
        most = max((tensor.size for tensor in tensors), default=1)
        shape = node.outputs[0].shape
        if shape is not None and shape.is_static():
            size = math.prod(shape.numpy())
        elif node.op_type in _UNSIZED:
            size = 32 * most
        else:
            return False
        # A weight that only changes its layout is no larger than it was.
        if size > FOLDED_OUTPUT and size > most:
            return False
        self._left -= size if node.op_type != "Transpose" else 0
        return None if self._left >= 0 else False


def longest_list(model: ir.Model) -> int:
    """The most numbers of a list of integers in a graph, as far as its shapes are known.

    Where such a list is cut, shape inference that follows values makes an entry for each of its numbers.
    """
    inputs = model.graph.inputs
    values = (
        *inputs,
        *model.graph.initializers.values(),
        *(value for node in model.graph.all_nodes() for value in node.outputs),
    )
    lists = (value for value in values if value.dtype in (ir.DataType.INT64, ir.DataType.INT32, None))
    return max((size for value in lists if len(value.shape or ()) == 1 for size in _known(value)), default=0)


def check_values(model: ir.Model, stored: int, path: Path) -> None:
    """Hold the values of a graph whose shapes are known against what its file holds.

    Raises:
        UnsupportedModelError: one that is far larger than all weights, whatever the size of a batch; names it.
    """
    for value in (*model.graph.inputs, *model.graph.outputs):
        size = math.prod(_known(value))
        if size > max(stored, 1 << 16):
            raise UnsupportedModelError(
                f"{path}: {value.name!r} has the shape {_axes(value.shape)}, and all weights together have {stored} numbers"
            )
    limit = max(SPARE_ELEMENTS, 2 * stored)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            size = math.prod(_known(value))
            if size > limit:
                raise UnsupportedModelError(
                    f"{path}: {_shown(node)} makes a value of {_axes(value.shape)}, and all weights together have {stored} "
                    "numbers"
                )


def _known(value: ir.Value) -> Sequence[int]:
    return [size for size in value.shape or () if isinstance(size, int)]


def _axes(shape: Any) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def _shown(node: ir.Node) -> str:
    return f"{node.op_type} {node.name or node.outputs[0].name!r}"
