"""The quantised matrices in an engine's file: read back by the contracts of the ops, and held to the source's weights.

What an engine is compared with is the model computed with the codes that its file holds: codes that make up for each other's
errors depend on the calibration text and, in their last bits, on the machine that made them. So a file is not held to codes
that are made again, but to the weights themselves.

Bounds: a code of b bits whose scale follows from the largest weight of its block leaves an error of about 0.7 / 2^(b - 1) of a
matrix whose weights are normal (0.086 for 4 bits, measured on such), and one that makes up for the errors of others leaves up
to twice that on purpose. Four times that is allowed. Another matrix, or one that is scaled or turned, is off by about 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.plan.weights_form import WeightsForm
from clada_export.quantise.codes import Coded, Codes
from clada_export.quantise.matrices import find_matrices
from clada_export.quantise.store import QuantStore
from clada_export.verify.report import Check
from graph_passes.emit import attribute_values
from graph_passes.op import FORMAT_BITS, SparseFFNAttributes, input_names
from graph_passes.op import OP_TYPE as FFN_OP
from graph_passes.quant.contract import BLOCK, DOMAIN, OP_TYPE
from graph_passes.quant.ffn_layout import unpack_in, unpack_out
from graph_passes.quant.layout import QuantisedMatrix, unpack
from graph_passes.quant.op import QuantMatMulAttributes
from graph_passes.quant.quantiser import FFN_ROLES, ffn_matrix
from graph_passes.quant.table import TABLE_BITS, TABLE_ROWS
from graph_passes.search import FFN_NAME

ERROR = 0.7
ALLOWED = 4.0
ALIKE = 0.7
"""The least cosine of a row and the same in codes: one of another matrix has about 0."""
SAID = 3
"""How many faults are named."""


@dataclass(frozen=True)
class FileMatrices:
    """What a file holds.

    Attributes:
        store: the codes, of the matrices that the file has.
        check: whether they are those of the source.
    """

    store: QuantStore
    check: Check


def read_matrices(model: Path, decoder: Decoder, form: WeightsForm, expected: QuantStore | None = None) -> FileMatrices:
    """Read every quantised matrix of a file.

    Args:
        model: the file that the engine runs.
        decoder: of the source.
        expected: the codes that were to be written, if they are known: the file has to hold these, to the bit.
    """
    matrices = find_matrices(decoder)
    codes = Codes(decoder, matrices)
    reader = _Reader(codes)
    for node in ir.load(model).graph:
        if (node.domain == DOMAIN and node.op_type in (OP_TYPE, FFN_OP)) or TABLE_ROWS in node.metadata_props:
            reader.read(node)
    there = {name: matrix for name, matrix in matrices.found.items() if name in reader.found}
    tied = matrices.tied if matrices.tied is not None and matrices.tied[1] in there else None
    if tied is not None:
        there[tied[0]] = matrices.found[tied[0]]
    codes.matrices = replace(matrices, found=there, tied=tied)
    store = QuantStore(codes, form)
    return FileMatrices(store, _check(reader, store, expected))


class _Reader:
    """Finds out which matrices of a model the nodes of a file hold, and keeps their codes.

    Attributes:
        found: the bits of each matrix that was met, by the path of its module.
    """

    def __init__(self, codes: Codes) -> None:
        self._codes, self._matrices = codes, codes.matrices
        self.found: dict[str, int] = {}
        self.faults: list[str] = []
        self._halves: dict[str, QuantisedMatrix] = {}
        self._first = {
            name: _unit(matrix.rows()[0]) for name, matrix in codes.matrices.found.items() if matrix.kind != "embedding"
        }

    def read(self, node: ir.Node) -> None:
        if TABLE_ROWS in node.metadata_props:
            self._take_table(node)
            return
        values = attribute_values(node)
        if node.op_type == OP_TYPE:
            attributes = QuantMatMulAttributes.from_onnx(values)
            self._take(str(node.name), unpack(_constant(node, 1), attributes))
            return
        ffn = SparseFFNAttributes.from_onnx(values)
        bits = FORMAT_BITS.get(ffn.weight_format)
        if bits is None:
            return
        named = {name: index for index, name in enumerate(input_names(ffn))}
        gate, up = unpack_in(_constant(node, named["w_in"]), bits, gated=ffn.gated)
        down = unpack_out(_constant(node, named["w_out"]), bits)
        name = node.metadata_props.get(FFN_NAME, str(node.name))
        parts = zip(FFN_ROLES, (gate, up, down), strict=True)
        self._take_ffn(name, {role: part for role, part in parts if part is not None})

    def _take_table(self, node: ir.Node) -> None:
        """A table of tokens of its own; one that is the head's is read there."""
        names = [name for name, matrix in self._matrices.found.items() if matrix.kind == "embedding"]
        if not names or self._matrices.tied is not None:
            return
        rows, bits = (int(node.metadata_props[key]) for key in (TABLE_ROWS, TABLE_BITS))
        self._keep(names[0], unpack(_constant(node, 0), QuantMatMulAttributes(rows, bits)))

    def _take_ffn(self, ffn: str, parts: dict[str, QuantisedMatrix]) -> None:
        for role, made in parts.items():
            part = self._matrices.parts.get(ffn_matrix(ffn, role))
            if part is None or part.matrix not in self._matrices.found:
                self.faults.append(f"{ffn}: the source has no such FFN")
                return
            shape = tuple(self._matrices.found[part.matrix].rows().shape)
            if part.packing is None:
                self._keep(part.matrix, made)
                continue
            # The other half comes with the other role.
            whole = self._halves.setdefault(part.matrix, _empty(shape, made.bits))
            part.of(torch.from_numpy(whole.codes)).copy_(torch.from_numpy(made.codes))
            part.of(torch.from_numpy(whole.scale)).copy_(torch.from_numpy(made.scale))
            if role == "up":
                self._keep(part.matrix, self._halves.pop(part.matrix))

    def _take(self, node: str, made: QuantisedMatrix) -> None:
        """One matrix after another: which they are, their first rows tell."""
        start = 0
        while start < len(made.codes):
            name = self._like(_row(made, start))
            size = 0 if name is None else len(self._matrices.found[name].rows())
            if name is None or start + size > len(made.codes):
                self.faults.append(f"{node}: its rows {start} and on are those of no matrix of the source")
                return
            rows = slice(start, start + size)
            self._keep(name, QuantisedMatrix(made.codes[rows], made.scale[rows], made.bits))
            start += size

    def _keep(self, name: str, made: QuantisedMatrix) -> None:
        if tuple(made.codes.shape) != tuple(self._matrices.found[name].rows().shape):
            self.faults.append(f"{name}: is {list(made.codes.shape)} in the file")
            return
        self.found[name] = made.bits
        self._codes.keep(name, made)

    def _like(self, row: Tensor) -> str | None:
        """The matrix whose first row this is; of several that are alike, one that was not met yet."""
        alike = {name: float(_unit(row) @ first) for name, first in self._first.items() if len(first) == len(row)}
        best = max(alike.values(), default=0.0)
        if not best >= ALIKE:
            return None
        near = [name for name, value in alike.items() if value >= best - 1e-3]
        return next((name for name in near if name not in self.found), near[0])


def _check(reader: _Reader, store: QuantStore, expected: QuantStore | None) -> Check:
    faults = list(reader.faults)
    numbers: dict[str, float] = {"matrices": len(reader.found)}
    bounds: dict[str, float] = {}
    for name in reader.found:
        coded, weight = store.codes.of(name, reader.found[name]), store.codes.matrices.found[name].rows()
        error = float((coded.decoded() - weight).norm() / weight.norm().clamp(min=1e-30))
        key, allowed = f"error_{coded.bits}_bits", ALLOWED * ERROR / 2 ** (coded.bits - 1)
        numbers[key], bounds[key] = max(numbers.get(key, 0.0), error), allowed
        if not error <= allowed:
            faults.append(f"{name}: is {error:.3g} of itself from the source's weights; allowed {allowed:.3g}")
        elif coded.bits != store.coded_bits(name):
            faults.append(f"{name}: has {coded.bits} bits, and the plan says {store.coded_bits(name)}")
        elif expected is not None and not _same(coded, expected.coded(name)):
            faults.append(f"{name}: its codes are not those that calibration measured")
    if expected is not None:
        numbers["missing"] = float(sum(name not in store.names for name in expected.names))
    said = "; ".join(faults[:SAID]) + (f"; and {len(faults) - SAID} more" if len(faults) > SAID else "")
    return Check("quantised matrices", not faults, numbers, bounds, said)


def _same(found: Coded, wanted: Coded) -> bool:
    bits = found.bits == wanted.bits and found.q.shape == wanted.q.shape
    return bits and torch.equal(found.q, wanted.q) and torch.equal(found.scale, wanted.scale)


def _constant(node: ir.Node, index: int) -> np.ndarray:
    """A constant of a node, which is not kept."""
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    found = np.array(value.const_value.numpy())
    if isinstance(value.const_value, ir.ExternalTensor):
        value.const_value.release()
    return found


def _row(matrix: QuantisedMatrix, row: int) -> Tensor:
    return torch.from_numpy(
        QuantisedMatrix(matrix.codes[row : row + 1], matrix.scale[row : row + 1], matrix.bits).dequantise()[0]
    )


def _unit(row: Tensor) -> Tensor:
    wide = row.double()
    unit: Tensor = wide / wide.norm().clamp(min=1e-300)
    return unit


def _empty(shape: tuple[int, ...], bits: int) -> QuantisedMatrix:
    rows, columns = shape
    return QuantisedMatrix(np.zeros((rows, columns), np.uint8), np.zeros((rows, columns // BLOCK), np.float16), bits)
