"""The quantised matrices in an engine's file, against the codes that the eager side computes with: the same to the bit.

They are read by the contract of the op (docs/quant-matmul-op.md), and compared as numbers: what a record holds of rows that are
padding does not matter.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from clada_export.quantise.codes import Coded
from clada_export.quantise.store import QuantStore
from clada_export.verify.report import Check
from graph_passes.quant.contract import DOMAIN, OP_TYPE
from graph_passes.quant.layout import QuantisedMatrix, unpack
from graph_passes.quant.op import QuantMatMulAttributes

SAID = 3
"""How many faults are named."""


def check_matrices(model: Path, store: QuantStore) -> Check:
    """Compare the weights of every QuantMatMul node of a file.

    Args:
        model: the file that the engine runs.
        store: of the model that it was made of. A node that packs several of its matrices is known by what it holds.
    """
    pieces = [store.coded(name) for name in store.names]
    faults: list[str] = []
    compared = 0
    for node in ir.load(model).graph:
        if (node.domain, node.op_type) != (DOMAIN, OP_TYPE):
            continue
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None
        attributes = QuantMatMulAttributes.from_onnx({key: item.value for key, item in node.attributes.items()})
        found = unpack(weight.const_value.numpy(), attributes)
        compared += len(found.codes)
        if not _known(found, pieces):
            faults.append(f"{node.name}: its codes or scales are not those of the model's matrices")
        if isinstance(weight.const_value, ir.ExternalTensor):
            weight.const_value.release()
    said = "; ".join(faults[:SAID]) + (f"; and {len(faults) - SAID} more" if len(faults) > SAID else "")
    return Check("quantised matrices", not faults, {"rows": compared, "nodes_apart": len(faults)}, {"nodes_apart": 0.0}, said)


def _known(found: QuantisedMatrix, pieces: list[Coded]) -> bool:
    """Whether a matrix is one of the model's after another, to the bit."""
    start = 0
    while start < len(found.codes):
        for piece in pieces:
            rows = slice(start, start + len(piece.q))
            if piece.bits == found.bits and _equal(found, rows, piece):
                break
        else:
            return False
        start += len(piece.q)
    return True


def _equal(found: QuantisedMatrix, rows: slice, piece: Coded) -> bool:
    scale = found.scale[rows]
    # The scales first: they tell most matrices apart.
    if scale.shape != tuple(piece.scale.shape) or not np.array_equal(
        scale.view(np.uint16), piece.scale.numpy().view(np.uint16)
    ):
        return False
    q = found.codes[rows].astype(np.int16) - (1 << (found.bits - 1))
    return bool(np.array_equal(q, piece.q.numpy()))
