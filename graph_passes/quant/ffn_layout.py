"""The layout of the quantised weights of `com.clada::SparseFFN` (docs/sparse-ffn-op.md): three matrices to bytes, and back.

Notation: d hidden size, f neurons, n = 2 (gate, up) or 1 (up), B = d / 32 blocks, G = f / 32 groups of neurons, T = n f / 32
tiles, R bytes of a record of QuantMatMul, Q = d R / 32 bytes of a group.
"""

from __future__ import annotations

import numpy as np

from graph_passes.op import OP_TYPE, ContractError
from graph_passes.quant.contract import BLOCK, HIGH_BITS, TILE_ROWS
from graph_passes.quant.layout import QuantisedMatrix, pack, unpack
from graph_passes.quant.op import QuantMatMulAttributes

UNIT = 32
"""Columns of w_out whose codes are whole bytes of each plane: four bytes for each bit of the plane."""
CHUNK = 128
"""Columns of w_out that a kernel sums together; the last chunk of a row has 32, 64 or 96 where these do not divide d."""
_SUMS, _LANES = 8, 4  # a chunk's columns are 8 sums of 4 lanes for each of its units
_HALF = TILE_ROWS // 2


def pack_in(gate: QuantisedMatrix | None, up: QuantisedMatrix) -> np.ndarray:
    """`w_in`, uint8 [T, B, R], of the matrices [f, d] of gate (None: a plain FFN) and up.

    Raises:
        ContractError: matrices of other sizes or forms than each other, offsets, or sizes that 32 does not divide.
    """
    _check("up", up, up)
    if gate is None:
        return pack(up)
    _check("gate", gate, up)
    return pack(QuantisedMatrix(_mixed(gate.codes, up.codes), _mixed(gate.scale, up.scale), up.bits))


def unpack_in(w_in: np.ndarray, bits: int, *, gated: bool) -> tuple[QuantisedMatrix | None, QuantisedMatrix]:
    """Gate and up of `w_in`.

    Raises:
        ContractError: bytes of another shape, or scales that are not finite.
    """
    rows = unpack(w_in, QuantMatMulAttributes(len(w_in) * TILE_ROWS, bits))
    if not gated:
        return None, rows
    halves = [rows.codes.reshape(-1, 2, _HALF, rows.codes.shape[1]), rows.scale.reshape(-1, 2, _HALF, rows.scale.shape[1])]
    gate, up = ([np.ascontiguousarray(part[:, i]).reshape(-1, part.shape[-1]) for part in halves] for i in range(2))
    return QuantisedMatrix(gate[0], gate[1], bits), QuantisedMatrix(up[0], up[1], bits)


def pack_out(down: QuantisedMatrix) -> np.ndarray:
    """`w_out`, uint8 [G, Q], of the matrix [d, f] of the down projection.

    Raises:
        ContractError: an offset, or sizes that 32 does not divide.
    """
    _check("down", down, down)
    d, f = down.codes.shape
    low_bits = down.bits - HIGH_BITS
    codes = np.ascontiguousarray(down.codes.T).reshape(f // BLOCK, BLOCK, d)
    planes = [_bytes(codes >> low_bits, HIGH_BITS)]
    if low_bits:
        planes.append(_bytes(codes & ((1 << low_bits) - 1), low_bits))
    neurons = np.concatenate(planes, axis=-1).reshape(f // BLOCK, -1)
    scales = np.ascontiguousarray(down.scale.T).astype("<f2", copy=False).view(np.uint8)
    return np.concatenate([neurons, scales], axis=-1)


def unpack_out(w_out: np.ndarray, bits: int) -> QuantisedMatrix:
    """The down projection [d, f] of `w_out`.

    Raises:
        ContractError: bytes of another shape, or scales that are not finite.
    """
    column = 4 * bits + 2  # bytes of 32 codes and a scale
    if w_out.dtype != np.uint8 or w_out.ndim != 2 or w_out.shape[1] % (UNIT * column) or w_out.size == 0:
        found = f"{w_out.dtype} {list(w_out.shape)}"
        raise ContractError(f"{OP_TYPE}: w_out is {found}; wanted uint8 [f / 32, {column} d], d divisible by {UNIT}")
    groups, d = len(w_out), w_out.shape[1] // column
    neurons = w_out[:, : -2 * d].reshape(groups, BLOCK, -1)
    high = d * HIGH_BITS // 8
    codes = _values(neurons[..., :high], HIGH_BITS) << (bits - HIGH_BITS)
    if bits > HIGH_BITS:
        codes |= _values(neurons[..., high:], bits - HIGH_BITS)
    scale = np.ascontiguousarray(w_out[:, -2 * d :]).view("<f2").astype(np.float16, copy=False)
    return QuantisedMatrix(np.ascontiguousarray(codes.reshape(groups * BLOCK, d).T), np.ascontiguousarray(scale.T), bits)


def _mixed(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Rows of both: 16 of the gate, the 16 of the same neurons of up, and so on."""
    parts = np.stack([each.reshape(-1, _HALF, each.shape[1]) for each in (gate, up)], axis=1)
    return parts.reshape(-1, gate.shape[1])


def _check(name: str, matrix: QuantisedMatrix, up: QuantisedMatrix) -> None:
    if matrix.offset is not None:
        raise ContractError(f"{OP_TYPE}: the matrix of {name} has offsets; quantised weights have scales alone")
    if matrix.bits != up.bits or matrix.codes.shape != up.codes.shape:
        raise ContractError(
            f"{OP_TYPE}: the matrix of {name} is {list(matrix.codes.shape)} of {matrix.bits} bits, that of up "
            f"{list(up.codes.shape)} of {up.bits}; wanted the same"
        )
    if any(size % BLOCK for size in matrix.codes.shape):
        raise ContractError(f"{OP_TYPE}: the matrix of {name} is {list(matrix.codes.shape)}; wanted sizes divisible by {BLOCK}")


def _chunks(d: int) -> list[tuple[slice, int]]:
    """The columns of the whole chunks together, and those of the rest; with the units of a chunk of each."""
    whole = d // CHUNK * CHUNK
    parts = [(slice(0, whole), CHUNK // UNIT), (slice(whole, d), (d - whole) // UNIT)]
    return [(columns, units) for columns, units in parts if columns.start < columns.stop]


def _bytes(values: np.ndarray, width: int) -> np.ndarray:
    """Values [G, 32, d] below 2^width as bytes [G, 32, d width / 8]."""
    parts = []
    for columns, units in _chunks(values.shape[-1]):
        part = values[..., columns].reshape(*values.shape[:2], -1, width, _SUMS // width, units, _LANES)
        together = part[..., 0, :, :].copy()
        for place in range(1, _SUMS // width):
            together |= part[..., place, :, :] << (width * place)
        parts.append(together.swapaxes(-3, -2).reshape(*values.shape[:2], -1))
    return np.concatenate(parts, axis=-1)


def _values(plane: np.ndarray, width: int) -> np.ndarray:
    """The reverse of `_bytes`."""
    parts, shifts = [], (width * np.arange(_SUMS // width, dtype=np.uint8))[:, None, None]
    for columns, units in _chunks(plane.shape[-1] * 8 // width):
        part = plane[..., columns.start * width // 8 : columns.stop * width // 8]
        by_sum = part.reshape(*plane.shape[:2], -1, units, width, _LANES).swapaxes(-3, -2)[..., None, :, :]
        values: np.ndarray = (by_sum >> shifts) & np.uint8((1 << width) - 1)
        parts.append(values.reshape(*plane.shape[:2], -1))
    return np.concatenate(parts, axis=-1)
