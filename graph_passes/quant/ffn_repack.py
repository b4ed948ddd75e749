"""Repack the weights of one FFN in codes, as a `Quantiser` makes them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graph_passes.matchers.common import FFNMatch
from graph_passes.matchers.weights import MatrixSource
from graph_passes.op import OP_TYPE, ContractError, SparseFFNAttributes, weight_shapes
from graph_passes.quant.ffn_layout import pack_in, pack_out
from graph_passes.quant.layout import QuantisedMatrix
from graph_passes.quant.quantiser import Quantiser, ffn_matrix
from graph_passes.repack import biases


def weight_format(match: FFNMatch, quantiser: Quantiser | None) -> str:
    """The op's `weight_format` for a layer: `plain` where the quantiser leaves all its matrices as they are.

    Raises:
        ContractError: matrices of different forms, or with offsets.
    """
    if quantiser is None:
        return "plain"
    forms = {role: quantiser.form(ffn_matrix(match.name, role)) for role in matrices(match)}
    if all(form is None for form in forms.values()):
        return "plain"
    found = {
        role: "plain" if form is None else f"int{form.bits}{' with offsets' * form.has_offset}" for role, form in forms.items()
    }
    if len(set(found.values())) > 1 or any(form is not None and form.has_offset for form in forms.values()):
        shown = ", ".join(f"{role} {text}" for role, text in found.items())
        raise ContractError(f"{match.name}: the matrices of an {OP_TYPE} need one format without offsets; they are {shown}")
    return next(iter(found.values()))


def matrices(match: FFNMatch) -> dict[str, MatrixSource]:
    """The layer's matrices by their roles (`FFN_ROLES`)."""
    gate = {} if match.gate is None else {"gate": match.gate}
    return {**gate, "up": match.up, "down": match.down}


def quantised_shapes(match: FFNMatch, attributes: SparseFFNAttributes) -> dict[str, tuple[int, ...]]:
    """The shapes of what `repack_quantised` gives, in its order."""
    shapes = weight_shapes(attributes, match.hidden_size, match.intermediate_size)
    return {name: shape for name, shape in shapes.items() if name in ("w_in", "w_out") or name.endswith("_bias")}


def repack_quantised(match: FFNMatch, quantiser: Quantiser) -> Mapping[str, np.ndarray]:
    """Read and quantise the weights of a layer, a matrix at a time.

    Returns:
        `w_in` uint8 [T, d/32, R], `w_out` uint8 [G, Q] and the biases of `graph_passes.repack`.

    Raises:
        ContractError: a number that is not finite.
    """

    def made(role: str, source: MatrixSource) -> QuantisedMatrix:
        return quantiser.matrix(ffn_matrix(match.name, role), np.asarray(source.read().T, dtype=np.float32))

    gate = None if match.gate is None else made("gate", match.gate)
    w_in = pack_in(gate, made("up", match.up))
    del gate
    return {"w_in": w_in, "w_out": pack_out(made("down", match.down)), **biases(match)}


def source_bytes(match: FFNMatch) -> int:
    """Bytes of the layer's matrices as the graph has them."""
    total = 0
    for source in matrices(match).values():
        dtype = source.value.dtype or ir.DataType.FLOAT
        total += int(np.prod(source.shape) * dtype.itemsize)
    return total
