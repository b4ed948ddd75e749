"""`Method`: a policy applied to a model, ready to be measured: everything but the thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from clada_export.decoder.ffn import EagerFFN
from clada_export.plan.layer import LayerPlan
from clada_export.plan.tensors import LayerTensors


@dataclass(frozen=True)
class Method:
    """One way to pick neurons.

    Attributes:
        label: what it is called beside other variants of its policy (`no prior`, `gamma 0.25`).
        layers: the plan of every FFN; their thresholds are not set yet.
        arrays: routers and neuron orders, by layer.
        allocations: names of `clada_export.calibration.allocation.ALLOCATIONS` that are tried.
        details: goes into the plan's `calibration`: how routers were trained, and the like.
    """

    label: str
    score: str
    rule: str
    layers: tuple[LayerPlan, ...]
    arrays: dict[str, LayerTensors] = field(default_factory=dict)
    allocations: tuple[str, ...] = ("cett", "fisher")
    details: dict[str, Any] = field(default_factory=dict)


def draft_layers(ffns: Sequence[EagerFFN], **settings: Any) -> tuple[LayerPlan, ...]:
    """A plan for every FFN with a threshold of zero.

    Args:
        settings: fields of `LayerPlan` that all layers share.
    """
    return tuple(
        LayerPlan(
            name=ffn.name,
            activation=ffn.activation,
            gated=ffn.gated,
            hidden_size=ffn.hidden_size,
            intermediate_size=ffn.intermediate_size,
            threshold=(0.0,),
            **settings,
        )
        for ffn in ffns
    )
