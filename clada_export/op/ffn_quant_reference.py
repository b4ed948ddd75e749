"""The products of a SparseFFN with quantised weights, for `clada_export.op.reference`: QuantMatMul's, to the bit.

They decode the matrices in every call: for tests and comparisons.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clada_export.op.quant_reference import quant_matmul
from graph_passes.op import FORMAT_BITS, SparseFFNAttributes
from graph_passes.quant.contract import TILE_ROWS
from graph_passes.quant.ffn_layout import unpack_out
from graph_passes.quant.layout import pack
from graph_passes.quant.op import QuantMatMulAttributes


def products_in(x: Tensor, w_in: Tensor, attributes: SparseFFNAttributes) -> tuple[Tensor, Tensor | None]:
    """x times the gate rows and the up rows, each float32 [.., f], without biases; a plain FFN's up rows and None.

    Args:
        x: float32 [.., d].
        w_in: uint8 [T, d/32, R].
    """
    bits = FORMAT_BITS[attributes.weight_format]
    sums = quant_matmul(x.numpy(), w_in.numpy(), QuantMatMulAttributes(len(w_in) * TILE_ROWS, bits))
    if not attributes.gated:
        return torch.from_numpy(sums), None
    halves = sums.reshape(*sums.shape[:-1], len(w_in), 2, TILE_ROWS // 2)
    gate, up = (np.ascontiguousarray(halves[..., i, :]).reshape(*sums.shape[:-1], -1) for i in range(2))
    return torch.from_numpy(gate), torch.from_numpy(up)


def product_out(hidden: Tensor, w_out: Tensor, attributes: SparseFFNAttributes) -> Tensor:
    """h, with zeros in the place of skipped neurons, times the down projection: float32 [.., d], without a bias."""
    down = unpack_out(w_out.numpy(), FORMAT_BITS[attributes.weight_format])
    return torch.from_numpy(quant_matmul(hidden.contiguous().numpy(), pack(down), down.attributes()))
