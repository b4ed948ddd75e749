"""The layout of QuantMatMul's weight (docs/quant-matmul-op.md): codes and scales to records, and back.

Notation: N rows and K columns of the matrix, B = K / 32 blocks, T tiles of 32 rows, R bytes of a record.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graph_passes.quant.contract import BLOCK, HIGH_BITS, OP_TYPE, STEP, TILE_ROWS
from graph_passes.quant.op import SCALE_BYTES, ContractError, QuantMatMulAttributes, record_bytes, weight_shape

_RUN = TILE_ROWS * STEP  # bytes
_STEPS = BLOCK // STEP
_TILES_AT_ONCE = 64  # bounds the scratch memory; 64 tiles of 1536 columns are 3 MB of codes


@dataclass(frozen=True)
class QuantisedMatrix:
    """A matrix in codes and scales: weight [n, k] stands for scale * (code - 2^(bits - 1)) + offset, of its block.

    Attributes:
        codes: uint8 [N, K], each below 2^bits.
        scale: float16 [N, B], finite.
        offset: float16 [N, B], finite; None where there are none.
        bits: of a code.

    Raises:
        ContractError: other types or shapes, a code that is too large, a scale or an offset that is not finite.
    """

    codes: np.ndarray
    scale: np.ndarray
    bits: int
    offset: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != np.uint8:
            raise ContractError(f"{OP_TYPE}: codes are {_shown(self.codes)}; wanted uint8 [N, K]")
        weight_shape(self.attributes(), self.codes.shape[1])
        if self.bits < 8 and self.codes.size and (largest := int(self.codes.max())) >= 1 << self.bits:
            raise ContractError(f"{OP_TYPE}: a code is {largest}; wanted codes below 2^{self.bits}")
        wanted = (self.codes.shape[0], self.codes.shape[1] // BLOCK)
        for name, values in (("scale", self.scale), ("offset", self.offset)):
            if values is None:
                continue
            if values.dtype != np.float16 or values.shape != wanted:
                raise ContractError(f"{OP_TYPE}: {name} is {_shown(values)}; wanted float16 {list(wanted)}")
            if not np.isfinite(values).all():
                row, block = np.argwhere(~np.isfinite(values))[0]
                raise ContractError(
                    f"{OP_TYPE}: the {name} of row {row}, block {block} is {values[row, block]}; wanted finite numbers"
                )

    def attributes(self, has_bias: bool = False) -> QuantMatMulAttributes:
        """Of a node with this matrix."""
        return QuantMatMulAttributes(self.codes.shape[0], self.bits, self.offset is not None, has_bias)

    def dequantise(self) -> np.ndarray:
        """What the codes stand for, float32 [N, K]."""
        rows, columns = self.codes.shape
        values = self.codes.reshape(rows, -1, BLOCK).astype(np.float32)
        values -= np.float32(1 << (self.bits - 1))
        values *= self.scale.astype(np.float32)[..., None]
        if self.offset is not None:
            values += self.offset.astype(np.float32)[..., None]
        return values.reshape(rows, columns)


def pack(matrix: QuantisedMatrix) -> np.ndarray:
    """The weight of a node, uint8 [T, B, R]."""
    attributes = matrix.attributes()
    shape = weight_shape(attributes, matrix.codes.shape[1])
    packed = np.empty(shape, np.uint8)
    for first in range(0, shape[0], _TILES_AT_ONCE):
        rows = slice(first * TILE_ROWS, (first + _TILES_AT_ONCE) * TILE_ROWS)
        out = packed[first : first + _TILES_AT_ONCE]
        codes = _tiles(matrix.codes[rows], len(out)).reshape(len(out), TILE_ROWS, shape[1], _STEPS, STEP)
        codes = np.ascontiguousarray(codes.transpose(0, 2, 3, 1, 4)).reshape(len(out), shape[1], _STEPS, _RUN)
        parts = [_plane(codes >> attributes.low_bits, HIGH_BITS)]
        if attributes.low_bits:
            parts.append(_plane(codes & ((1 << attributes.low_bits) - 1), attributes.low_bits))
        for values in (matrix.scale, matrix.offset):
            if values is not None:
                by_block = np.ascontiguousarray(_tiles(values[rows], len(out)).transpose(0, 2, 1))
                parts.append(by_block.astype("<f2", copy=False).view(np.uint8))
        np.concatenate(parts, axis=-1, out=out)
    return packed


def unpack(weight: np.ndarray, attributes: QuantMatMulAttributes) -> QuantisedMatrix:
    """The matrix that a node's weight holds; what is in the padding of the last tile is not looked at.

    Raises:
        ContractError: `weight` has not the shape that the attributes want, or scales that are not finite.
    """
    codes, scale, offset = unpack_parts(weight, attributes)
    return QuantisedMatrix(codes, scale, attributes.bits, offset)


def unpack_parts(weight: np.ndarray, attributes: QuantMatMulAttributes) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """`unpack` without a look at the values: codes uint8 [N, K], scales and offsets float16 [N, B].

    Raises:
        ContractError: `weight` has not the shape that the attributes want.
    """
    tiles = -(-attributes.out_features // TILE_ROWS)
    size = record_bytes(attributes.bits, attributes.has_offset)
    if weight.dtype != np.uint8 or weight.ndim != 3 or weight.shape[0] != tiles or weight.shape[2] != size:
        raise ContractError(f"{OP_TYPE}: the weight is {_shown(weight)}; wanted uint8 [{tiles}, K / {BLOCK}, {size}]")
    blocks, at = weight.shape[1], 0
    codes = np.zeros((tiles, blocks, _STEPS, _RUN), np.uint8)
    for width, shift in ((HIGH_BITS, attributes.low_bits), (attributes.low_bits, 0)):
        codes |= _steps(weight[..., at : at + width * _RUN], width) << shift
        at += width * _RUN
    by_row = codes.reshape(tiles, blocks, _STEPS, TILE_ROWS, STEP).transpose(0, 3, 1, 2, 4)
    rows = np.ascontiguousarray(by_row).reshape(tiles * TILE_ROWS, blocks * BLOCK)[: attributes.out_features]
    pairs = []
    for _ in range(1 + attributes.has_offset):
        values = np.ascontiguousarray(weight[..., at : at + SCALE_BYTES]).view("<f2").astype(np.float16, copy=False)
        pairs.append(np.ascontiguousarray(values.transpose(0, 2, 1)).reshape(-1, blocks)[: attributes.out_features])
        at += SCALE_BYTES
    return rows, pairs[0], pairs[1] if attributes.has_offset else None


def _tiles(rows: np.ndarray, tiles: int) -> np.ndarray:
    """[rows, ..] as [tiles, 32, ..], filled up with zeros."""
    missing = tiles * TILE_ROWS - len(rows)
    if missing:
        rows = np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])
    return rows.reshape(tiles, TILE_ROWS, *rows.shape[1:])


def _plane(steps: np.ndarray, width: int) -> np.ndarray:
    """Values [T, B, 8, 128] below 2^width as runs of bytes [T, B, width * 128]."""
    together = steps.reshape(*steps.shape[:2], width, 8 // width, _RUN)
    runs = together[..., 0, :].copy()
    for place in range(1, 8 // width):
        runs |= together[..., place, :] << (width * place)
    return runs.reshape(*steps.shape[:2], width * _RUN)


def _steps(plane: np.ndarray, width: int) -> np.ndarray:
    """The reverse of `_plane`: [T, B, 8, 128]; zeros of a plane of no width."""
    if width == 0:
        return np.zeros((*plane.shape[:2], _STEPS, _RUN), np.uint8)
    runs = plane.reshape(*plane.shape[:2], width, 1, _RUN)
    shifts = (width * np.arange(8 // width, dtype=np.uint8))[:, None]
    values: np.ndarray = (runs >> shifts) & np.uint8((1 << width) - 1)
    return values.reshape(*plane.shape[:2], _STEPS, _RUN)


def _shown(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
