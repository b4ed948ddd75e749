"""Nodes of `com.clada::QuantMatMul` held against its contract, which is data (`graph_passes.quant.contract`).

It computes nothing: the meaning of the op is `clada_export.op.quant_reference`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graph_passes.op import ContractError
from graph_passes.quant.contract import BITS, BLOCK, HIGH_BITS, INPUTS, MOST_FEATURES, OP_TYPE, TILE_ROWS

__all__ = ["ContractError", "QuantMatMulAttributes", "input_names", "record_bytes", "weight_shape"]

SCALE_BYTES = TILE_ROWS * 2
"""Of the scales of a record, and of its offsets."""


@dataclass(frozen=True)
class QuantMatMulAttributes:
    """The attributes of one node.

    Attributes:
        out_features: N, the rows of the matrix.
        bits: of a code.
        has_offset: every block of a row has an offset beside its scale.
        has_bias: the bias is an input.

    Raises:
        ContractError: a value outside the contract, with the value found and the values allowed.
    """

    out_features: int
    bits: int = 8
    has_offset: bool = False
    has_bias: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.out_features < MOST_FEATURES:
            raise ContractError(
                f"{OP_TYPE}: attribute 'out_features' is {self.out_features}; it must be at least 1 and below {MOST_FEATURES}"
            )
        if self.bits not in BITS:
            raise ContractError(f"{OP_TYPE}: attribute 'bits' is {self.bits}; allowed: {', '.join(map(str, BITS))}")

    @property
    def zero(self) -> int:
        """The code that stands for the offset, or for 0."""
        return 1 << (self.bits - 1)

    @property
    def low_bits(self) -> int:
        """Bits of a code in the low plane."""
        return self.bits - HIGH_BITS

    def to_onnx(self) -> dict[str, int]:
        """The attributes as ONNX stores them."""
        return {
            "out_features": self.out_features,
            "bits": self.bits,
            "has_offset": int(self.has_offset),
            "has_bias": int(self.has_bias),
        }

    @classmethod
    def from_onnx(cls, values: Mapping[str, Any]) -> QuantMatMulAttributes:
        """Read attributes from a node; names that are not the op's are ignored.

        Raises:
            ContractError: a value outside the contract, or no `out_features`.
        """
        return cls(
            out_features=int(values.get("out_features", 0)),
            bits=int(values.get("bits", 8)),
            has_offset=bool(values.get("has_offset", 0)),
            has_bias=bool(values.get("has_bias", 0)),
        )


def input_names(attributes: QuantMatMulAttributes) -> tuple[str, ...]:
    """The names of a node's inputs, in order. None is optional."""
    return INPUTS if attributes.has_bias else INPUTS[:-1]


def record_bytes(bits: int, has_offset: bool) -> int:
    """R, the bytes of a record."""
    return TILE_ROWS * BLOCK * bits // 8 + SCALE_BYTES * (1 + has_offset)


def weight_shape(attributes: QuantMatMulAttributes, in_features: int) -> tuple[int, int, int]:
    """The shape [T, B, R] of the weight of a matrix of `in_features` columns.

    Raises:
        ContractError: blocks do not divide `in_features`.
    """
    if in_features < 1 or in_features % BLOCK:
        raise ContractError(f"{OP_TYPE}: in_features is {in_features}; wanted a multiple of {BLOCK}, at least {BLOCK}")
    tiles = -(-attributes.out_features // TILE_ROWS)
    return tiles, in_features // BLOCK, record_bytes(attributes.bits, attributes.has_offset)
