"""Nodes of `com.clada::SparseFFN` held against its contract.

The contract is data (`graph_passes.contract`, made from `plugins/sparse_ffn.yaml`); this module reads it. It says which inputs
and outputs a node has for a given set of attributes, which values an attribute may take, and which shapes belong together. It
computes nothing: the meaning of the op is `clada_export.op.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from graph_passes.contract import (
    ACTIVATIONS,
    ATTRIBUTES,
    COMBINES,
    CONSTRAINTS,
    DOMAIN,
    INPUTS,
    OP_TYPE,
    OP_VERSION,
    OUTPUTS,
    RULES,
    SCORES,
    SHADOW_BLOCK,
    STAT_NORMS,
    WEIGHT_FORMATS,
    WEIGHT_TYPES,
    AttributeValues,
)
from graph_passes.contract_types import Attribute, Tensor, holds, shape_of

__all__ = [
    "ACTIVATIONS",
    "COMBINES",
    "DOMAIN",
    "FORMAT_BITS",
    "OP_TYPE",
    "OP_VERSION",
    "RULES",
    "SCORES",
    "SHADOW_BLOCK",
    "STAT_NORMS",
    "WEIGHT_FORMATS",
    "WEIGHT_TYPES",
    "ContractError",
    "SparseFFNAttributes",
    "input_names",
    "input_shapes",
    "output_names",
    "weight_shapes",
    "x_types",
]


FORMAT_BITS: Mapping[str, int] = {name: int(name.removeprefix("int")) for name in WEIGHT_FORMATS if name != "plain"}
"""The bits of a code, by each `weight_format` whose weights are codes."""
GROUP = 32
"""Neurons, or numbers of x, that share scales in quantised weights."""

_STORED: Mapping[str, type[Any]] = {"string": str, "int": int, "float": float}
"""The Python type of an attribute as ONNX stores it."""


class ContractError(ValueError):
    """An attribute or a shape that `com.clada::SparseFFN` does not allow."""


@dataclass(frozen=True)
class SparseFFNAttributes(AttributeValues):
    """The attributes of one node. Defaults are those of the op.

    `load_slope`, `load_min` and `load_max` give the multiplier of the threshold,
    `m(load) = clip(exp(-load_slope * load), load_min, load_max)`; a slope of 0 switches the load response off.

    `stat_norm` says how a prompt row's hidden values h enter the statistic that `emit_stat` asks for. `row`: h^2 / norm(h)^2,
    so that each row weighs the same (Griffin, arXiv 2404.01365). `none`: h^2, so that sqrt(stat) is a neuron's L2 magnitude
    over the prompt (TDA, arXiv 2408.11393; the formula is our own derivation, from descriptions of the method).

    Raises:
        ContractError: a value outside the contract, with the value found and the values allowed.
    """

    def __post_init__(self) -> None:
        for attribute in ATTRIBUTES:
            _check_value(attribute, getattr(self, attribute.name))
        for constraint in CONSTRAINTS:
            if constraint.broken(self):
                raise ContractError(f"{OP_TYPE}: {constraint.message.format_map(_shown(self))}")

    def to_onnx(self) -> dict[str, int | float | str]:
        """The attributes as ONNX stores them: booleans as 0 or 1, and a float as a float even if it was given as an integer."""
        values: dict[str, Any] = asdict(self)
        return {attribute.name: _STORED[attribute.type](values[attribute.name]) for attribute in ATTRIBUTES}

    @classmethod
    def from_onnx(cls, values: Mapping[str, Any]) -> SparseFFNAttributes:
        """Read attributes from a node; names that are not the op's (`plugin_version`, ...) are ignored.

        Raises:
            ContractError: a value outside the contract.
        """
        known: dict[str, Any] = {}
        for attribute in ATTRIBUTES:
            if attribute.name in values:
                known[attribute.name] = (bool if attribute.is_flag else _STORED[attribute.type])(values[attribute.name])
        return cls(**known)


def _check_value(attribute: Attribute, value: Any) -> None:
    if attribute.type == "string" and value not in attribute.allowed:
        allowed = ", ".join(map(str, attribute.allowed))
        raise ContractError(f"{OP_TYPE}: attribute {attribute.name!r} is {value!r}; allowed: {allowed}")
    if attribute.type == "float" and not math.isfinite(value):
        raise ContractError(f"{OP_TYPE}: attribute {attribute.name!r} is {value}; it must be finite")


def _shown(attributes: SparseFFNAttributes) -> dict[str, Any]:
    """The values as a message shows them: flags are 0 or 1."""
    return {name: int(value) if isinstance(value, bool) else value for name, value in asdict(attributes).items()}


def input_names(attributes: SparseFFNAttributes) -> tuple[str, ...]:
    """The names of a node's inputs, in order. None is optional."""
    return tuple(tensor.name for tensor in INPUTS if holds(tensor.when, attributes))


def output_names(attributes: SparseFFNAttributes) -> tuple[str, ...]:
    """The names of a node's outputs, in order."""
    return tuple(tensor.name for tensor in OUTPUTS if holds(tensor.when, attributes))


def x_types(weight_type: str, weight_format: str = "plain") -> tuple[str, ...]:
    """The types that x and y may have, one for both, with weights of `weight_type`.

    Raises:
        ContractError: a type that weights can't have.
    """
    if weight_format != "plain":
        if weight_type != "uint8":
            raise ContractError(f"{OP_TYPE}: the weights have type {weight_type}; wanted uint8 with {weight_format}")
        return ("float32",)
    if weight_type not in WEIGHT_TYPES:
        raise ContractError(f"{OP_TYPE}: the weights have type {weight_type}; wanted {' or '.join(WEIGHT_TYPES)}")
    return tuple(dict.fromkeys(("float32", weight_type)))


def weight_shapes(attributes: SparseFFNAttributes, hidden_size: int, intermediate_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a node's constant inputs (`threshold` as one value a granule, the larger of its two forms).

    Raises:
        ContractError: the sizes do not fit the granule or the shadow's block.
    """
    d, f = hidden_size, intermediate_size
    if d < 1 or f < 1:
        raise ContractError(f"{OP_TYPE}: hidden_size is {d} and intermediate_size is {f}; both must be at least 1")
    if f % attributes.granule:
        raise ContractError(f"{OP_TYPE}: intermediate_size {f} is not divisible by granule {attributes.granule}")
    if attributes.score == "shadow" and d % SHADOW_BLOCK:
        raise ContractError(f"{OP_TYPE}: score 'shadow' needs hidden_size divisible by {SHADOW_BLOCK}; it is {d}")
    if attributes.weight_format != "plain" and (d % GROUP or f % GROUP):
        raise ContractError(
            f"{OP_TYPE}: weight_format {attributes.weight_format!r} needs hidden_size and intermediate_size divisible by "
            f"{GROUP}; they are {d} and {f}"
        )
    sizes = _sizes(attributes, d, f)
    constant = [tensor for tensor in INPUTS if tensor.is_constant and holds(tensor.when, attributes)]
    return {tensor.name: shape_of(_largest(tensor, attributes), sizes) for tensor in constant}


def input_shapes(
    attributes: SparseFFNAttributes, rows: tuple[int, ...], hidden_size: int, intermediate_size: int
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The shapes that each input of a node may have in a call, in the inputs' order.

    Args:
        rows: x's shape without its last axis.
    """
    sizes = {"B": rows[0] if rows else 0, **_sizes(attributes, hidden_size, intermediate_size)}
    return {
        tensor.name: tuple(shape_of(axes, sizes, rows) for axes in _allowed_shapes(tensor, attributes, len(rows)))
        for tensor in INPUTS
        if holds(tensor.when, attributes)
    }


def _largest(tensor: Tensor, attributes: SparseFFNAttributes) -> tuple[str | int, ...]:
    quantised = tensor.instead is not None and not holds(tensor.instead.unless, attributes)
    return tensor.shapes_with(attributes)[-1] if quantised else tensor.shapes[-1]


def _allowed_shapes(tensor: Tensor, attributes: SparseFFNAttributes, rank: int) -> list[tuple[str | int, ...]]:
    """A sequence's axis is there with two axes of rows only."""
    return [axes for axes in tensor.shapes_with(attributes) if rank == 2 or "B" not in axes]


def _sizes(attributes: SparseFFNAttributes, d: int, f: int) -> dict[str, int]:
    n = 2 if attributes.gated else 1
    sizes = {"d": d, "f": f, "n": n, "E": f // attributes.granule}
    if attributes.weight_format != "plain":
        record = GROUP * (4 * FORMAT_BITS[attributes.weight_format] + 2)
        sizes |= {"T": n * f // GROUP, "R": record, "Q": d * record // GROUP}
    return sizes
