"""Rows of a quantised matrix looked up: what tokens are embedded with, from the records that the head is multiplied from.

Written in standard operators: a token takes 64 of a record's bytes for each block, and two for its scale.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.emit import Emitter, Initializer
from graph_passes.quant.contract import BLOCK, HIGH_BITS, STEP, TILE_ROWS
from graph_passes.quant.op import QuantMatMulAttributes

TABLE_ROWS, TABLE_BITS = "clada.table_rows", "clada.table_bits"
"""Metadata of the node that takes records from a table: how many rows it has, and the bits of a code."""

_RUN = TILE_ROWS * STEP


def table_name(module: str) -> str:
    """What a quantiser calls the table that a module looks rows up in.

    Args:
        module: its path.
    """
    return f"{module}:table"


def emit_rows(
    ids: ir.Value,
    weight: ir.Value,
    attributes: QuantMatMulAttributes,
    in_features: int,
    name: str,
    initializer: Initializer,
    emitter: Emitter,
) -> ir.Value:
    """Write the nodes that look rows up.

    Args:
        ids: int64 of any shape, each at least 0 and below the rows of the matrix.
        weight: uint8 [T, B, R] as QuantMatMul has it, without offsets.
        in_features: K, the columns of the matrix.
        name: constants are called after it.

    Returns:
        float32 [.., K]: exactly what the codes stand for.
    """
    op = emitter.op
    blocks = in_features // BLOCK

    def ints(what: str, *values: int) -> ir.Value:
        return initializer(f"{name}.{what}", np.array(values, np.int64))

    def whole(what: str, values: np.ndarray) -> ir.Value:
        return initializer(f"{name}.{what}", values)

    planes = [(0, HIGH_BITS)]
    if attributes.low_bits:
        planes.append((_RUN * HIGH_BITS, attributes.low_bits))
    scale_at = _RUN * attributes.bits
    # Of row 0, the byte of each of the 32 codes in each plane, and the two of its scale; row r's are further by r times `step`.
    first = np.concatenate([*(_bytes(at, width) for at, width in planes), [scale_at, scale_at + 1]]).astype(np.int64)
    step = np.repeat(np.array([STEP, 2], np.int64), [BLOCK * len(planes), 2])

    flat = op("Reshape", ids, ints("flat", -1))
    tile_rows = ints("tile_rows", TILE_ROWS)
    records = op("Gather", weight, op("Div", flat, tile_rows), axis=0)  # [n, B, R]
    gather = records.producer()
    assert gather is not None
    gather.metadata_props.update({TABLE_ROWS: str(attributes.out_features), TABLE_BITS: str(attributes.bits)})
    row = op("Reshape", op("Mod", flat, tile_rows), ints("column", -1, 1, 1))
    place = op("Add", op("Mul", row, whole("step", step)), whole("first", first))
    places = op("Expand", place, ints("blocks", 1, blocks, 1))
    found = op("Cast", op("GatherElements", records, places, axis=2), to=int(ir.DataType.INT32))
    sizes = [BLOCK] * len(planes) + [1, 1]
    *parts, low, high = emitter.several("Split", len(sizes), found, ints("sizes", *sizes), axis=2)
    code: ir.Value | None = None
    for index, ((_, width), part) in enumerate(zip(planes, parts, strict=True)):
        value = op("Mod", op("Div", part, whole(f"places{index}", _places(width))), whole(f"below{index}", _one(1 << width)))
        code = value if code is None else op("Add", op("Mul", code, whole("upper", _one(1 << width))), value)
    assert code is not None
    q = op("Cast", op("Sub", code, whole("zero", _one(attributes.zero))), to=int(ir.DataType.FLOAT))
    # A float16 is a number for its upper byte, and one for each step of its lower byte.
    base, unit = (op("Gather", whole(what, table), high) for what, table in zip(("base", "unit"), _halves(), strict=True))
    scale = op("Add", base, op("Mul", unit, op("Cast", low, to=int(ir.DataType.FLOAT))))
    rows = op("Mul", q, scale)  # [n, B, 32]
    shape = op("Concat", op("Shape", ids), ints("width", in_features), axis=0)
    return op("Reshape", rows, shape)


def _bytes(at: int, width: int) -> np.ndarray:
    """Of row 0, the byte of each of the 32 codes in a plane of `width` bits that begins at byte `at` of a record."""
    k = np.arange(BLOCK)
    run = (k // STEP) // (8 // width)
    return at + run * _RUN + k % STEP


def _places(width: int) -> np.ndarray:
    """By what each code's byte is divided, int32 [32]."""
    k = np.arange(BLOCK)
    places: np.ndarray = (1 << (width * ((k // STEP) % (8 // width)))).astype(np.int32)
    return places


def _one(value: int) -> np.ndarray:
    return np.array(value, np.int32)


def _halves() -> tuple[np.ndarray, np.ndarray]:
    """For each upper byte of a finite float16 its value with a lower byte of 0, and a lower byte's unit; float32 [256] each."""
    upper = np.arange(256)
    exponent = (upper >> 2) & 31
    sign = np.where(upper >= 128, -1.0, 1.0)
    unit = sign * 2.0 ** (np.maximum(exponent, 1) - 25.0)
    whole = np.where(exponent > 0, 1024, 0) + (upper & 3) * 256
    return (unit * whole).astype(np.float32), unit.astype(np.float32)
