"""The products of a SparseFFN with quantised weights in standard ONNX operators, for `graph_passes.function_body`.

As in QuantMatMul's function the integers are the op's, and the sums are in another order. The layouts are those of
`graph_passes.quant.ffn_layout`: d hidden size, f neurons, T tiles, G groups of neurons, Q bytes of a group.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.op import FORMAT_BITS, SparseFFNAttributes
from graph_passes.quant.contract import BLOCK, HIGH_BITS, TILE_ROWS
from graph_passes.quant.ffn_layout import CHUNK, UNIT
from graph_passes.quant.function_body import ProductBody
from graph_passes.quant.op import QuantMatMulAttributes

_HALF, _SUMS, _LANES = TILE_ROWS // 2, 8, 4


class QuantisedProducts(ProductBody):
    """Emits the products on a tape."""

    def __init__(self, attributes: SparseFFNAttributes, tape: ir.tape.Tape) -> None:
        super().__init__(QuantMatMulAttributes(1, FORMAT_BITS[attributes.weight_format]), tape)
        self.gated = attributes.gated

    def inner(self, x: ir.Value, w_in: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        """x [.., d] times gate and up of `w_in` [T, d/32, R]: float32 [.., f] each; of a plain FFN up, and None."""
        rows = self.product(x, w_in, None)
        if not self.gated:
            return rows, None
        leading = self.op("Shape", x, end=-1)
        tiles = self.op("Shape", w_in, start=0, end=1)
        halves = self.op("Reshape", rows, self.op("Concat", leading, tiles, self.ints(2, _HALF), axis=0))
        width = self.op("Mul", tiles, self.ints(_HALF))
        shape = self.op("Concat", leading, width, axis=0)
        gate, up = (self.op("Gather", halves, self.constant(np.array(i, np.int64)), axis=-2) for i in range(2))
        return self.op("Reshape", gate, shape), self.op("Reshape", up, shape)

    def outer(self, hidden: ir.Value, w_out: ir.Value) -> ir.Value:
        """hidden [.., f] times `w_out` [G, Q]: float32 [.., d]."""
        bits = self.attributes.bits
        groups = self.op("Shape", w_out, start=0, end=1)
        columns = self.op("Div", self.op("Shape", w_out, start=1, end=2), self.ints(4 * bits + 2))
        octets = self.to(w_out, ir.DataType.INT32)
        codes_end = self.op("Mul", columns, self.ints(BLOCK * bits // 8))
        codes = self.op("Slice", octets, self.ints(0), codes_end, self.ints(1))
        neurons = self.op("Reshape", codes, self.op("Concat", groups, self.ints(BLOCK, -1), axis=0))
        high_end = self.op("Div", columns, self.ints(8 // HIGH_BITS))
        values = self.columns(neurons, self.ints(0), high_end, HIGH_BITS, columns)
        if low_bits := self.attributes.low_bits:
            low = self.columns(neurons, high_end, self.ints(2**31 - 1), low_bits, columns)
            values = self.op("Add", self.op("Mul", values, self.whole(1 << low_bits)), low)
        values = self.to(self.op("Sub", values, self.whole(self.attributes.zero)), ir.DataType.FLOAT)  # [G, 32, d]
        pairs = self.op("Slice", octets, codes_end, self.ints(2**31 - 1), self.ints(1))
        pairs = self.op("Reshape", pairs, self.op("Concat", groups, self.ints(1), columns, self.ints(2), axis=0))
        hq, sh = self.quantised(hidden, groups)
        return self.op("ReduceSum", self.terms(hq, sh, values, self.wide(pairs)), self.ints(-3, -2), keepdims=0)

    def columns(self, neurons: ir.Value, first: ir.Value, end: ir.Value, width: int, columns: ir.Value) -> ir.Value:
        """The values of the plane in bytes [first, end) of each neuron [G, 32, ..]: int32 [G, 32, d]."""
        plane = self.op("Slice", neurons, first, end, self.ints(2))
        chunks = self.op("Div", columns, self.ints(CHUNK))
        whole_end = self.op("Mul", chunks, self.ints(CHUNK * width // 8))
        rest = self.op("Div", self.op("Mod", columns, self.ints(CHUNK)), self.ints(UNIT))  # units of the last chunk
        whole = self.op("Slice", plane, self.ints(0), whole_end, self.ints(2))
        last = self.op("Slice", plane, whole_end, self.ints(2**31 - 1), self.ints(2))
        units = self.ints(CHUNK // UNIT)
        both = [self.chunks(whole, chunks, units, width), self.chunks(last, self.ints(1), rest, width)]
        return self.op("Concat", *both, axis=2)

    def chunks(self, part: ir.Value, count: ir.Value, units: ir.Value, width: int) -> ir.Value:
        """Bytes [G, 32, ..] of `count` chunks of `units` units as values [G, 32, their columns]; there may be none."""
        groups = self.op("Shape", part, start=0, end=1)
        shape = self.op("Concat", groups, self.ints(BLOCK), count, units, self.ints(width, 1, _LANES), axis=0)
        by_byte = self.op("Reshape", part, shape, allowzero=1)
        places = 1 << (width * np.arange(_SUMS // width, dtype=np.int32))
        values = self.op("Div", by_byte, self.constant(places.reshape(-1, 1)))
        values = self.op("Mod", values, self.whole(1 << width))  # [G, 32, chunks, units, bytes, places, 4]
        values = self.op("Transpose", values, perm=[0, 1, 2, 4, 5, 3, 6])
        columns = self.op("Mul", self.op("Mul", count, units), self.ints(UNIT))
        return self.op("Reshape", values, self.op("Concat", groups, self.ints(BLOCK), columns, axis=0), allowzero=1)
