"""The contract of `com.clada::SparseFFN`, version 1, as data.

This module is the Python twin of `plugins/sparse_ffn.yaml` (a test compares the two). It says which inputs and outputs a node
has for a given set of attributes, which values an attribute may take, and which shapes belong together. It computes nothing:
the meaning of the op is `clada_export.op.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

DOMAIN = "com.clada"
OP_TYPE = "SparseFFN"
OP_VERSION = 1

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")
SCORES = ("gate", "exact", "shadow", "prefix", "external")
RULES = ("threshold", "relative", "topk")
COMBINES = ("sum", "weighted")
STAT_NORMS = ("row", "none")
WEIGHT_FORMATS = ("plain",)
WEIGHT_TYPES = ("float32", "float16", "bfloat16")

SHADOW_BLOCK = 32
"""Weights that share one (scale, offset) pair in the 4-bit shadow. `hidden_size` must be a multiple of it."""


class ContractError(ValueError):
    """An attribute or a shape that `com.clada::SparseFFN` does not allow."""


@dataclass(frozen=True)
class SparseFFNAttributes:
    """The attributes of one node. Defaults are those of the op.

    `load_slope`, `load_min` and `load_max` give the multiplier of the threshold,
    `m(load) = clip(exp(-load_slope * load), load_min, load_max)`; a slope of 0 switches the load response off.

    `stat_norm` says how a prompt row's hidden values h enter the statistic that `emit_stat` asks for. `row`: h^2 / norm(h)^2,
    so that each row weighs the same (Griffin, arXiv 2404.01365). `none`: h^2, so that sqrt(stat) is a neuron's L2 magnitude
    over the prompt (TDA, arXiv 2408.11393; the formula is our own derivation, from descriptions of the method).

    Raises:
        ContractError: a value outside the contract, with the value found and the values allowed.
    """

    activation: str = "silu"
    gated: bool = True
    weight_format: str = "plain"
    score: str = "gate"
    rule: str = "threshold"
    granule: int = 1
    combine: str = "sum"
    load_slope: float = 0.0
    load_min: float = 0.25
    load_max: float = 4.0
    use_stat: bool = False
    backbone_min: float = 0.0
    prior_gamma: float = 0.0
    emit_stat: bool = False
    stat_norm: str = "row"
    emit_active: bool = False
    has_bias: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("activation", ACTIVATIONS),
            ("weight_format", WEIGHT_FORMATS),
            ("score", SCORES),
            ("rule", RULES),
            ("combine", COMBINES),
            ("stat_norm", STAT_NORMS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ContractError(f"{OP_TYPE}: attribute {name!r} is {value!r}; allowed: {', '.join(allowed)}")
        if self.granule < 1:
            raise ContractError(f"{OP_TYPE}: attribute 'granule' is {self.granule}; it must be at least 1")
        for name in ("load_slope", "load_min", "load_max", "backbone_min", "prior_gamma"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ContractError(f"{OP_TYPE}: attribute {name!r} is {value}; it must be finite")
        if not 0.0 < self.load_min <= self.load_max:
            raise ContractError(
                f"{OP_TYPE}: load_min is {self.load_min} and load_max is {self.load_max}; 0 < load_min <= load_max is needed"
            )
        if self.backbone_min < 0.0 or self.prior_gamma < 0.0:
            raise ContractError(
                f"{OP_TYPE}: backbone_min is {self.backbone_min} and prior_gamma is {self.prior_gamma}; neither may be negative"
            )
        if not self.use_stat and (self.score == "prefix" or self.backbone_min > 0.0 or self.prior_gamma > 0.0):
            raise ContractError(f"{OP_TYPE}: score 'prefix', backbone_min and prior_gamma need use_stat = 1")
        if self.combine == "weighted" and self.score != "external":
            raise ContractError(f"{OP_TYPE}: combine 'weighted' needs score 'external'; score is {self.score!r}")

    def to_onnx(self) -> dict[str, int | float | str]:
        """The attributes as ONNX stores them: booleans as 0 or 1, and a float as a float even if it was given as an integer."""
        values: dict[str, Any] = asdict(self)
        stored = {bool: int, int: int, float: float, str: str}
        return {key: stored[type(getattr(type(self), key))](value) for key, value in values.items()}

    @classmethod
    def from_onnx(cls, values: Mapping[str, Any]) -> SparseFFNAttributes:
        """Read attributes from a node; names that are not the op's (`plugin_version`, ...) are ignored.

        Raises:
            ContractError: a value outside the contract.
        """
        known: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in values:
                known[field.name] = type(getattr(cls, field.name))(values[field.name])
        return cls(**known)


def input_names(attributes: SparseFFNAttributes) -> tuple[str, ...]:
    """The names of a node's inputs, in order. None is optional."""
    names = ["x", "load", "w_in", "w_out", "threshold"]
    names += {
        "gate": [],
        "exact": ["neuron_scale"],
        "shadow": ["neuron_scale", "shadow", "shadow_scale"],
        "prefix": [],
        "external": ["score"],
    }[attributes.score]
    if attributes.use_stat:
        names.append("past_stat")
    if attributes.has_bias:
        names += ["gate_bias", "up_bias", "down_bias"] if attributes.gated else ["up_bias", "down_bias"]
    return tuple(names)


def output_names(attributes: SparseFFNAttributes) -> tuple[str, ...]:
    """The names of a node's outputs, in order."""
    names = ["y"]
    if attributes.emit_stat:
        names.append("stat")
    if attributes.emit_active:
        names.append("active")
    return tuple(names)


def x_types(weight_type: str) -> tuple[str, ...]:
    """The types that x and y may have, one for both, with weights of `weight_type`.

    Raises:
        ContractError: a type that weights can't have.
    """
    if weight_type not in WEIGHT_TYPES:
        raise ContractError(f"{OP_TYPE}: the weights have type {weight_type}; wanted {' or '.join(WEIGHT_TYPES)}")
    return tuple(dict.fromkeys(("float32", weight_type)))


def weight_shapes(attributes: SparseFFNAttributes, hidden_size: int, intermediate_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a node's constant inputs (`threshold` as one value a granule, the larger of its two forms).

    Raises:
        ContractError: the sizes do not fit the granule or the shadow's block.
    """
    d, f, n = hidden_size, intermediate_size, 2 if attributes.gated else 1
    if d < 1 or f < 1:
        raise ContractError(f"{OP_TYPE}: hidden_size is {d} and intermediate_size is {f}; both must be at least 1")
    if f % attributes.granule:
        raise ContractError(f"{OP_TYPE}: intermediate_size {f} is not divisible by granule {attributes.granule}")
    shapes: dict[str, tuple[int, ...]] = {
        "w_in": (f, n, d),
        "w_out": (f, d),
        "threshold": (f // attributes.granule,),
    }
    if attributes.score in ("exact", "shadow"):
        shapes["neuron_scale"] = (f,)
    if attributes.score == "shadow":
        if d % SHADOW_BLOCK:
            raise ContractError(f"{OP_TYPE}: score 'shadow' needs hidden_size divisible by {SHADOW_BLOCK}; it is {d}")
        shapes["shadow"] = (f, n, d // 2)
        shapes["shadow_scale"] = (f, n, d // SHADOW_BLOCK, 2)
    if attributes.has_bias:
        if attributes.gated:
            shapes["gate_bias"] = (f,)
        shapes["up_bias"] = (f,)
        shapes["down_bias"] = (d,)
    return shapes
