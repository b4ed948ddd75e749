"""The contract of `com.clada::SparseFFN`, version 1, as data. `graph_passes.op` reads and checks nodes by it.

Made from `plugins/sparse_ffn.yaml` by `make contract`. Change that file, and run it again; do not edit this one.
"""

from __future__ import annotations

from dataclasses import dataclass

from graph_passes.contract_types import Attribute, Condition, Constraint, Instead, Tensor

DOMAIN = "com.clada"
OP_TYPE = "SparseFFN"
OP_VERSION = 1

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")
WEIGHT_FORMATS = ("plain", "int4", "int5", "int6", "int8")
SCORES = ("gate", "exact", "shadow", "prefix", "external")
RULES = ("threshold", "relative", "topk")
COMBINES = ("sum", "weighted")
STAT_NORMS = ("row", "none")
WEIGHT_TYPES = ("float32", "float16", "bfloat16")

SHADOW_BLOCK = 32
"""Weights that share one (scale, offset) pair in the 4-bit shadow. `hidden_size` must be a multiple of it."""


@dataclass(frozen=True)
class AttributeValues:
    """The attributes of one node, unchecked. Defaults are those of the op."""

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


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("activation", "string", "silu", allowed=ACTIVATIONS),
    Attribute("gated", "int", 1, allowed=(0, 1)),
    Attribute("weight_format", "string", "plain", allowed=WEIGHT_FORMATS),
    Attribute("score", "string", "gate", allowed=SCORES),
    Attribute("rule", "string", "threshold", allowed=RULES),
    Attribute("granule", "int", 1),
    Attribute("combine", "string", "sum", allowed=COMBINES),
    Attribute("load_slope", "float", 0.0, by_reference=True),
    Attribute("load_min", "float", 0.25, by_reference=True),
    Attribute("load_max", "float", 4.0, by_reference=True),
    Attribute("use_stat", "int", 0, allowed=(0, 1)),
    Attribute("backbone_min", "float", 0.0, by_reference=True),
    Attribute("prior_gamma", "float", 0.0, by_reference=True),
    Attribute("emit_stat", "int", 0, allowed=(0, 1)),
    Attribute("stat_norm", "string", "row", allowed=STAT_NORMS, read_when={"emit_stat": (1,)}),
    Attribute("emit_active", "int", 0, allowed=(0, 1)),
    Attribute("has_bias", "int", 0, allowed=(0, 1)),
)

INPUTS: tuple[Tensor, ...] = (
    Tensor("x", "X", (("rows", "d"),)),
    Tensor("load", "float32", (("rows",),)),
    Tensor("w_in", "W", (("f", "n", "d"),), instead=Instead("uint8", (("T", "d/32", "R"),), {"weight_format": ("plain",)})),
    Tensor("w_out", "W", (("f", "d"),), instead=Instead("uint8", (("f/32", "Q"),), {"weight_format": ("plain",)})),
    Tensor("threshold", "float32", ((1,), ("E",)), only_first_when={"rule": ("topk",)}),
    Tensor("neuron_scale", "float32", (("f",),), when={"score": ("exact", "shadow")}),
    Tensor("shadow", "int8", (("f", "n", "d/2"),), when={"score": ("shadow",)}),
    Tensor("shadow_scale", "float16", (("f", "n", "d/32", 2),), when={"score": ("shadow",)}),
    Tensor("score", "float32", (("rows", "E"), ("B", "E")), when={"score": ("external",)}),
    Tensor("past_stat", "float32", (("B", "f"),), when={"use_stat": (1,)}),
    Tensor("gate_bias", "float32", (("f",),), when={"has_bias": (1,), "gated": (1,)}),
    Tensor("up_bias", "float32", (("f",),), when={"has_bias": (1,)}),
    Tensor("down_bias", "float32", (("d",),), when={"has_bias": (1,)}),
)

OUTPUTS: tuple[Tensor, ...] = (
    Tensor("y", "X", (("rows", "d"),)),
    Tensor("stat", "float32", (("B", "f"),), when={"emit_stat": (1,)}),
    Tensor("active", "int32", (("rows",),), when={"emit_active": (1,)}),
)

CONSTRAINTS: tuple[Constraint, ...] = (
    Constraint(
        (),
        (
            Condition("granule", ">=", 1),
            Condition("granule", "<", 2147483648),
        ),
        "attribute 'granule' is {granule}; it must be at least 1 and below 2^31",
    ),
    Constraint(
        (),
        (
            Condition("load_min", ">", 0.0),
            Condition("load_max", ">", 0.0),
            Condition("load_min", "<=", "load_max", right_is_attribute=True),
        ),
        "load_min is {load_min} and load_max is {load_max}; 0 < load_min <= load_max is needed",
    ),
    Constraint(
        (),
        (
            Condition("backbone_min", ">=", 0.0),
            Condition("prior_gamma", ">=", 0.0),
        ),
        "backbone_min is {backbone_min} and prior_gamma is {prior_gamma}; neither may be negative",
    ),
    Constraint(
        (
            Condition("score", "==", "prefix"),
            Condition("backbone_min", ">", 0.0),
            Condition("prior_gamma", ">", 0.0),
        ),
        (Condition("use_stat", "==", 1),),
        "score 'prefix', backbone_min and prior_gamma need use_stat = 1; use_stat is {use_stat}",
    ),
    Constraint(
        (Condition("combine", "==", "weighted"),),
        (Condition("score", "==", "external"),),
        "combine 'weighted' needs score 'external'; score is '{score}'",
    ),
    Constraint(
        (Condition("weight_format", "!=", "plain"),),
        (
            Condition("score", "==", "exact"),
            Condition("granule", "==", 1),
        ),
        "weight_format '{weight_format}' needs score 'exact' and granule 1; score is '{score}' and granule {granule}",
    ),
    Constraint(
        (Condition("weight_format", "!=", "plain"),),
        (
            Condition("use_stat", "==", 0),
            Condition("emit_stat", "==", 0),
        ),
        "weight_format '{weight_format}' has no statistic; use_stat is {use_stat} and emit_stat {emit_stat}",
    ),
)
