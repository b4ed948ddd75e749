"""The meaning of `com.clada::QuantMatMul`, to the bit (docs/quant-matmul-op.md).

It decodes the whole matrix in every call: for tests and comparisons.
"""

from __future__ import annotations

import math

import numpy as np

from graph_passes.quant.contract import BLOCK, LEAST_AMAX, OP_TYPE
from graph_passes.quant.layout import unpack_parts
from graph_passes.quant.op import ContractError, QuantMatMulAttributes


def quant_matmul(
    x: np.ndarray, weight: np.ndarray, attributes: QuantMatMulAttributes, bias: np.ndarray | None = None
) -> np.ndarray:
    """What a node gives.

    Args:
        x: float32 [.., K].
        weight: uint8 [T, B, R].
        bias: float32 [N], with `has_bias`.

    Returns:
        float32 [.., N].

    Raises:
        ContractError: shapes that do not belong together, or a bias that the attributes do not want.
    """
    codes, scale, offset = unpack_parts(weight, attributes)
    if x.shape[-1] != codes.shape[1]:
        raise ContractError(f"{OP_TYPE}: x has {x.shape[-1]} columns and the weight {codes.shape[1]}")
    if (bias is not None) != attributes.has_bias:
        raise ContractError(f"{OP_TYPE}: has_bias is {int(attributes.has_bias)}, but a bias is {'not ' * (bias is None)}given")
    xq, sx = quantise_rows(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    sums = xq.sum(axis=-1).astype(np.float32)
    values = codes.reshape(len(codes), -1, BLOCK).astype(np.float64) - attributes.zero
    total = np.zeros((len(xq), len(codes)), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for b in range(xq.shape[1]):
            exact = xq[:, b].astype(np.float64) @ values[:, b].T  # integers below 2^20
            total = fused_multiply_add(exact.astype(np.float32), np.multiply.outer(sx[:, b], _wide(scale[:, b])), total)
            if offset is not None:
                product = np.multiply.outer(sx[:, b], _wide(offset[:, b]))
                total = fused_multiply_add(np.broadcast_to(sums[:, b, None], total.shape), product, total)
        if bias is not None:
            total = total + bias
    return total.reshape(*x.shape[:-1], len(codes))


def quantise_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [r, K] in 8 bits: integers int32 [r, B, 32], within -127 .. 127, and scales float32 [r, B]."""
    blocks = x.astype(np.float32, copy=False).reshape(len(x), x.shape[1] // BLOCK, BLOCK)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        largest = np.abs(blocks).max(axis=-1)
        finite = np.isfinite(blocks).all(axis=-1)
        live = finite & (largest >= np.float32(LEAST_AMAX))
        safe = np.where(live, largest, np.float32(1))
        scale = np.where(live, safe / np.float32(127), np.where(finite, np.float32(0), np.float32("nan")))
        rounded = np.rint(np.where(live[..., None], blocks, np.float32(0)) * (np.float32(127) / safe)[..., None])
    return rounded.astype(np.int32), scale


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32, rounded once.

    The product of two float32 is exact in float64. Its sum with c is rounded there to odd (the last bit is set if anything was
    cut off), so that the rounding to float32 sees on which side of a tie the exact sum lies: 53 bits are more than 24 + 2.
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    # What the sum lost (Knuth's TwoSum).
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    cut = np.isfinite(total) & (lost != 0) & (bits & 1 == 0)
    toward_zero = (lost < 0) != (total < 0)
    odd = np.where(cut, bits + np.where(toward_zero, -1, 1), bits)
    return odd.view(np.float64).astype(np.float32)


def _wide(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)
