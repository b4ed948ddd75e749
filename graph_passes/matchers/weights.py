"""Constant operands: where a weight comes from, and how to read it when it is needed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_NO_NUMBERS = (ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128, ir.DataType.UNDEFINED)
QUANTISED_OPS = (
    "DequantizeLinear",
    "MatMulNBits",
    "MatMulBnb4",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QLinearMatMul",
    "QGemm",
    "DynamicQuantizeMatMul",
)
MOST_STEPS = 4
"""Nodes between an operand and its constant: each tool that changes types or layouts puts one there."""


@dataclass(frozen=True)
class Columns:
    """A slice of output columns."""

    start: int
    stop: int
    step: int = 1

    @property
    def count(self) -> int:
        return len(range(self.start, self.stop, self.step))


@dataclass(frozen=True)
class MatrixSource:
    """A weight [in, out] that lies in an initializer; `transposed`: the initializer is [out, in].

    `cast`: the type that a Cast makes of it before it is used, if there is one: weights may be kept in fewer bits.
    """

    value: ir.Value
    transposed: bool = False
    columns: Columns | None = None
    cast: ir.DataType | None = None

    @property
    def dtype(self) -> ir.DataType | None:
        """The type that the product computes with."""
        return self.cast or self.value.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        rows, columns = _dims(self.value)[-2:]
        if self.transposed:
            rows, columns = columns, rows
        return rows, columns if self.columns is None else self.columns.count

    def read(self) -> np.ndarray:
        """The weight [in, out], as a view where possible, in the type that the initializer has."""
        array = _read(self.value)
        return _take(array.T if self.transposed else array, self.columns)


@dataclass(frozen=True)
class VectorSource:
    """A bias [out] that lies in an initializer."""

    value: ir.Value
    columns: Columns | None = None

    @property
    def size(self) -> int:
        return int(np.prod(_dims(self.value), dtype=np.int64)) if self.columns is None else self.columns.count

    def read(self) -> np.ndarray:
        """The bias [out]."""
        return _take(_read(self.value).reshape(-1), self.columns)


def _take(array: np.ndarray, columns: Columns | None) -> np.ndarray:
    return array if columns is None else array[..., columns.start : columns.stop : columns.step]


def _read(value: ir.Value) -> np.ndarray:
    if value.const_value is None:
        raise ValueError(f"initializer {value.name!r} has no data any more")
    return value.const_value.numpy()


def _dims(value: ir.Value) -> tuple[int, ...]:
    tensor = value.const_value
    assert tensor is not None
    return tuple(tensor.shape.numpy())


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is an initializer that no graph input can override, with its data."""
    return value is not None and value.const_value is not None and value.is_initializer() and not value.is_graph_input()


def constant_scalar(value: ir.Value | None, steps: int = MOST_STEPS) -> float | None:
    """The number a one-element constant holds (initializer, Constant node, or either behind a DequantizeLinear or Cast)."""
    node = value.producer() if value is not None else None
    if node is not None and steps == 0:
        return None
    if node is not None and casts_floats(node):
        return constant_scalar(node.inputs[0], steps - 1)
    if node is not None and node.op_type == "DequantizeLinear":
        level, scale, *zero = (constant_scalar(operand, steps - 1) for operand in node.inputs[:3])
        return None if level is None or scale is None else (level - (zero[0] or 0.0 if zero else 0.0)) * scale
    array = constant_array(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def constant_array(value: ir.Value | None, limit: int = 1024) -> np.ndarray | None:
    """A small constant of real numbers, read; None if the value is something else or has more than `limit` elements."""
    if value is None or value.is_graph_input():
        return None
    tensor = value.const_value
    node = value.producer()
    if tensor is None and node is not None:
        tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > limit or tensor.dtype in _NO_NUMBERS:
        return None
    return tensor.numpy()


def constant_integers(value: ir.Value | None) -> np.ndarray | None:
    """A small constant of integers, int64; None if the value is something else."""
    array = constant_array(value)
    return array.astype(np.int64) if array is not None and array.dtype.kind in "iu" else None


def constant_integer(value: ir.Value | None) -> int | None:
    """The integer that a one-element constant holds."""
    array = constant_integers(value)
    return int(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def matrix_source(value: ir.Value | None, transposed: bool = False, steps: int = MOST_STEPS) -> MatrixSource | str:
    """Describe the weight operand of a projection, or say why it is not a constant matrix.

    Transposes and Casts of an initializer are looked through.
    """
    if value is None:
        return "the weight is missing"
    node = value.producer()
    if node is not None and steps == 0:
        return f"weights are more than {MOST_STEPS} nodes away from {value.name!r}"
    if node is not None and node.op_type == "Transpose":
        permutation = node.attributes.get_ints("perm", (1, 0))
        if tuple(permutation) == (1, 0):
            return matrix_source(node.inputs[0], not transposed, steps - 1)
    if node is not None and node.op_type == "Identity":
        return matrix_source(node.inputs[0], transposed, steps - 1)
    if node is not None and casts_floats(node):
        inner = matrix_source(node.inputs[0], transposed, steps - 1)
        if isinstance(inner, str):
            return inner
        if inner.cast is not None:
            return f"weight {inner.value.name!r} is cast twice: the first Cast rounds what the second makes wider"
        return replace(inner, cast=ir.DataType(node.attributes.get_int("to", ir.DataType.FLOAT)))
    if node is not None and node.op_type in QUANTISED_OPS:
        return f"quantised weights behind {node.op_type} {node.name!r}"
    if not is_constant(value):
        return f"weights are not constant: {value.name!r}"
    if len(_dims(value)) != 2:
        return f"weight {value.name!r} has shape {list(_dims(value))}; a matrix is needed"
    return MatrixSource(value, transposed)


def casts_floats(node: ir.Node) -> bool:
    """Whether a node is a Cast from one floating-point type to another, as far as is known; types of 8 bits quantise."""
    if node.op_type != "Cast" or node.inputs[0] is None:
        return False
    to, source = ir.DataType(node.attributes.get_int("to", ir.DataType.FLOAT)), node.inputs[0].dtype
    return to in (*FLOATS, ir.DataType.DOUBLE) and (source is None or source.is_floating_point())


def rounds_values(node: ir.Node) -> bool:
    """Whether a DequantizeLinear undoes a QuantizeLinear: together they round values that are computed, and no weight."""
    before = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] is not None else None
    return before is not None and before.op_type == "QuantizeLinear"


def integer_product(node: ir.Node | None) -> ir.Node | None:
    """The MatMulInteger whose result `node`, a Mul after a Cast, gives its scale (ONNX Runtime's dynamic quantisation)."""
    if node is None or node.op_type != "Mul":
        return None
    for operand in node.inputs:
        cast = operand.producer() if operand is not None else None
        source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
        product = source.producer() if source is not None else None
        if product is not None and product.op_type == "MatMulInteger":
            return product
    return None


def vector_source(value: ir.Value | None, steps: int = MOST_STEPS) -> VectorSource | None:
    """Describe a bias operand: a constant with one axis longer than one, the last. None if it is not one."""
    node = None if value is None else value.producer()
    if node is not None and casts_floats(node):
        return vector_source(node.inputs[0], steps - 1) if steps else None
    if value is None or not is_constant(value):
        return None
    dims = _dims(value)
    if not dims or any(size != 1 for size in dims[:-1]):
        return None
    return VectorSource(value)
