"""The ONNX function `com.clada::QuantMatMul`: the op's meaning in standard ONNX operators (docs/quant-matmul-op.md).

Its integers are the op's; its sums are in another order and without fma, so the last bits of y differ. It decodes the matrix
in every call: it makes a model run where the native op is missing. `out_features` reaches it by reference, so that one function
serves all matrices of a format.

Notation: K and N columns and rows of the matrix, B blocks, T tiles, `..` the leading axes of x.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.quant.contract import (
    ATTRIBUTES,
    BLOCK,
    DOMAIN,
    HIGH_BITS,
    LEAST_AMAX,
    OP_TYPE,
    OUTPUTS,
    STEP,
    TILE_ROWS,
)
from graph_passes.quant.op import SCALE_BYTES, QuantMatMulAttributes, input_names

MIN_OPSET, DEFAULT_OPSET = 18, 20
VARIANT = "clada.variant"
"""Metadata key of a function that tells which structural variant it is."""

_RUN = TILE_ROWS * STEP


def variant_name(attributes: QuantMatMulAttributes) -> str:
    """A name for the structural variant that `attributes` need; ONNX overloads of the function are named by it."""
    flags = [name for name in ("has_offset", "has_bias") if getattr(attributes, name)]
    return "_".join([f"bits{attributes.bits}", *flags])


def make_function(attributes: QuantMatMulAttributes, *, overload: str = "", opset: int = DEFAULT_OPSET) -> ir.Function:
    """Build the function for one structural variant.

    Args:
        attributes: structure of the op; `out_features` is not used: nodes bring their own.
        overload: ONNX overload name, for models that hold several variants.
        opset: version of the standard operators; a function has to use its model's.

    Raises:
        ValueError: an opset below 18.
    """
    if opset < MIN_OPSET:
        raise ValueError(f"{OP_TYPE}: the function needs opset {MIN_OPSET} or later; the model has {opset}")
    body = ProductBody(attributes)
    y = body.build()
    y.name = OUTPUTS[0]
    graph = ir.Graph(list(body.inputs.values()), [y], nodes=list(body.tape.nodes), opset_imports={"": opset}, name=OP_TYPE)
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in ATTRIBUTES]
    function = ir.Function(DOMAIN, OP_TYPE, overload, graph=graph, attributes=declared)
    function.metadata_props[VARIANT] = variant_name(attributes)
    function.doc_string = "Product of rows with a constant matrix of 4 to 8-bit weights."
    return function


class ProductBody:
    """Emits the nodes of one function on `tape`."""

    def __init__(self, attributes: QuantMatMulAttributes, tape: ir.tape.Tape | None = None) -> None:
        self.attributes = attributes
        self.tape = ir.tape.Tape() if tape is None else tape
        self.inputs = {name: ir.Value(name=name) for name in input_names(attributes)}
        self._constants: dict[tuple[object, ...], ir.Value] = {}

    def op(self, op_type: str, *inputs: ir.Value, **attributes: float | str | list[int]) -> ir.Value:
        return self.tape.op(op_type, list(inputs), attributes)

    def constant(self, array: np.ndarray) -> ir.Value:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.tape.op("Constant", [], {"value": ir.Tensor(array)})
        return self._constants[key]

    def floats(self, value: float) -> ir.Value:
        return self.constant(np.array(value, np.float32))

    def ints(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def whole(self, value: int) -> ir.Value:
        return self.constant(np.array(value, np.int32))

    def to(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.op("Cast", value, to=int(dtype))

    def out_features(self) -> ir.Value:
        """N, int64 [1]."""
        value = self.tape.op("Constant", [])
        node = value.producer()
        assert node is not None
        node.attributes["value_int"] = ir.RefAttr("value_int", "out_features", ir.AttributeType.INT)
        return self.op("Reshape", value, self.ints(1))

    def build(self) -> ir.Value:
        """y [.., N]."""
        y = self.product(self.inputs["x"], self.inputs["weight"], self.out_features())
        return self.op("Add", y, self.inputs["bias"]) if self.attributes.has_bias else y

    def product(self, x: ir.Value, weight: ir.Value, features: ir.Value | None) -> ir.Value:
        """x [.., K] times the first `features` rows of a weight, int64 [1], or all: float32 [.., N]."""
        attributes = self.attributes
        self.features = features
        # Bytes as int32: every runtime divides those.
        self.weight = self.to(weight, ir.DataType.INT32)
        self.size = self.op("Shape", self.weight, start=0, end=2)  # T, B
        self.rows = self.op("Mul", self.op("Shape", self.weight, start=0, end=1), self.ints(TILE_ROWS))
        xq, sx = self.quantised(x, self.op("Shape", self.weight, start=1, end=2))
        scales_at = _RUN * attributes.bits
        terms = self.terms(xq, sx, self.op("Transpose", self.codes(), perm=[1, 2, 0]), self.halves(scales_at))
        if attributes.has_offset:
            sums = self.op("Unsqueeze", self.op("ReduceSum", xq, self.ints(-1), keepdims=1), self.ints(-1))
            offsets = self.op("Mul", self.op("Unsqueeze", sx, self.ints(-1)), self.halves(scales_at + SCALE_BYTES))
            terms = self.op("Add", terms, self.op("Mul", sums, offsets))
        return self.op("ReduceSum", terms, self.ints(-3, -2), keepdims=0)

    def terms(self, xq: ir.Value, sx: ir.Value, codes: ir.Value, scales: ir.Value) -> ir.Value:
        """What each block adds: [.., B, 1, N], of codes [B, 32, N] and scales [B, 1, N]."""
        exact = self.op("MatMul", self.op("Unsqueeze", xq, self.ints(-2)), codes)
        return self.op("Mul", exact, self.op("Mul", self.op("Unsqueeze", sx, self.ints(-1)), scales))

    def quantised(self, x: ir.Value, blocks: ir.Value) -> tuple[ir.Value, ir.Value]:
        """x in 8 bits: whole numbers in float32 [.., B, 32], and scales [.., B, 1]."""
        leading = self.op("Shape", x, end=-1)
        x = self.op("Reshape", x, self.op("Concat", leading, blocks, self.ints(BLOCK), axis=0))
        bad = self.op("Or", self.op("IsNaN", x), self.op("IsInf", x))
        zero = self.floats(0.0)
        x = self.op("Where", bad, zero, x)
        bad = self.op("ReduceMax", self.op("Cast", bad, to=int(ir.DataType.FLOAT)), self.ints(-1), keepdims=1)
        bad = self.op("Greater", bad, zero)
        largest = self.op("ReduceMax", self.op("Abs", x), self.ints(-1), keepdims=1)
        live = self.op("And", self.op("GreaterOrEqual", largest, self.floats(LEAST_AMAX)), self.op("Not", bad))
        safe = self.op("Where", live, largest, self.floats(1.0))
        inverse = self.op("Where", live, self.op("Div", self.floats(127.0), safe), zero)
        scale = self.op("Where", live, self.op("Div", safe, self.floats(127.0)), zero)
        scale = self.op("Where", bad, self.floats(float("nan")), scale)
        return self.op("Round", self.op("Mul", x, inverse)), scale

    def codes(self) -> ir.Value:
        """code - zero as float32 [N, B, 32]."""
        low_bits = self.attributes.low_bits
        codes = self.plane(0, HIGH_BITS)
        if low_bits:
            low = self.plane(_RUN * HIGH_BITS, low_bits)
            codes = self.op("Add", self.op("Mul", codes, self.whole(1 << low_bits)), low)
        codes = self.to(self.op("Sub", codes, self.whole(self.attributes.zero)), ir.DataType.FLOAT)
        return codes if self.features is None else self.op("Slice", codes, self.ints(0), self.features, self.ints(0))

    def plane(self, at: int, width: int) -> ir.Value:
        """The values of the plane that begins at byte `at` of each record: int32 [T * 32, B, 32]."""
        part = self.op("Slice", self.weight, self.ints(at), self.ints(at + width * _RUN), self.ints(2))
        # [T, B, runs, 1, rows, 4], each byte by its places.
        runs = self.op("Reshape", part, self.op("Concat", self.size, self.ints(width, 1, TILE_ROWS, STEP), axis=0))
        places = 1 << (width * np.arange(8 // width, dtype=np.int32))
        values = self.op("Div", runs, self.constant(places.reshape(-1, 1, 1)))
        values = self.op("Mod", values, self.whole(1 << width))
        values = self.op("Transpose", values, perm=[0, 4, 1, 2, 3, 5])
        blocks = self.op("Shape", self.weight, start=1, end=2)
        return self.op("Reshape", values, self.op("Concat", self.rows, blocks, self.ints(BLOCK), axis=0))

    def halves(self, at: int) -> ir.Value:
        """The float16 numbers at byte `at` of each record, as float32 [B, 1, N]."""
        part = self.op("Slice", self.weight, self.ints(at), self.ints(at + SCALE_BYTES), self.ints(2))
        pairs = self.op("Reshape", part, self.op("Concat", self.size, self.ints(TILE_ROWS, 2), axis=0))
        by_block = self.op("Transpose", self.wide(pairs), perm=[1, 0, 2])  # [B, T, rows]
        blocks = self.op("Shape", self.weight, start=1, end=2)
        by_block = self.op("Reshape", by_block, self.op("Concat", blocks, self.ints(1), self.rows, axis=0))
        return by_block if self.features is None else self.op("Slice", by_block, self.ints(0), self.features, self.ints(2))

    def wide(self, pairs: ir.Value) -> ir.Value:
        """The float16 numbers whose bytes are `pairs`, int32 [.., 2], as float32 [..]."""
        low = self.op("Gather", pairs, self.constant(np.array(0, np.int64)), axis=-1)
        high = self.op("Gather", pairs, self.constant(np.array(1, np.int64)), axis=-1)  # sign, 5 bits exponent, 2 of mantissa
        exponent = self.op("Mod", self.op("Div", high, self.whole(4)), self.whole(32))
        mantissa = self.op("Add", self.op("Mul", self.op("Mod", high, self.whole(4)), self.whole(256)), low)
        normal = self.op("Greater", exponent, self.whole(0))
        whole = self.op("Where", normal, self.op("Add", mantissa, self.whole(1024)), mantissa)
        powers = np.array([2.0 ** (max(e, 1) - 25) for e in range(31)] + [np.inf], np.float32)
        value = self.op("Mul", self.to(whole, ir.DataType.FLOAT), self.op("Gather", self.constant(powers), exponent))
        not_a_number = self.op("And", self.op("Equal", exponent, self.whole(31)), self.op("Greater", mantissa, self.whole(0)))
        value = self.op("Where", not_a_number, self.floats(float("nan")), value)
        return self.op("Where", self.op("Greater", high, self.whole(127)), self.op("Neg", value), value)
