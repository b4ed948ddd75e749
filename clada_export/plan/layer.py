"""`LayerPlan`: what a sparsity plan says of one FFN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from graph_passes.op import SparseFFNAttributes
from graph_passes.router import Router


@dataclass(frozen=True)
class RouterForm:
    """What a `Router` is besides its numbers: how many linear layers, the functions between and after them, how many granules
    share a softmax (`k`), and what rows that run dense score (`dense_rows`)."""

    layers: int
    hidden: str
    output: str
    normalise: bool
    scale: float
    k: int | None = None
    dense_rows: str = "ones"

    @classmethod
    def of(cls, router: Router) -> RouterForm:
        """The form of a router."""
        return cls(
            len(router.weights), router.hidden, router.output, router.normalise, router.scale, router.k, router.dense_rows
        )


@dataclass(frozen=True)
class LayerPlan:
    """One FFN. `name` is the module path of its down projection (`model.layers.0.mlp.down_proj`).

    `threshold` holds one value, or one a granule. `granule`, `combine`, `backbone_min`, `prior_gamma` and `stat_norm` are the
    op's attributes. `kept_neurons` counts the neurons that the engine holds, if not all (whole neurons were pruned);
    `reordered` says that they are stored in another order (experts). `router` is the form of the network that scores the
    granules. `merge` is the number of experts whose weights are merged for each segment (segment state), or None; the router
    then scores the experts, and the op runs dense rows only. `adapter_rank` is the rank of what fine-tuning adds to the
    weights (`arrays` holds it), or None for the model's own. `expected_sparsity` is the share of neurons skipped and
    `expected_cett` the relative error of the FFN output (`docs/calibration.md`), both
    measured on the calibration text at load 0 (held-out text with `merge`).
    """

    name: str
    activation: str
    gated: bool
    hidden_size: int
    intermediate_size: int
    threshold: tuple[float, ...]
    load_slope: float = 0.0
    load_min: float = 0.25
    load_max: float = 4.0
    expected_sparsity: float = 0.0
    expected_cett: float = 0.0
    granule: int = 1
    combine: str = "sum"
    backbone_min: float = 0.0
    prior_gamma: float = 0.0
    stat_norm: str = "row"
    kept_neurons: int | None = None
    reordered: bool = False
    router: RouterForm | None = None
    merge: int | None = None
    adapter_rank: int | None = None

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> LayerPlan:
        """The layer of parsed JSON; `PLAN_SCHEMA` has said what it holds."""
        router = value.get("router")
        return cls(
            **{
                **with_floats(cls, value),
                "threshold": tuple(float(t) for t in value["threshold"]),
                "router": None if router is None else RouterForm(**with_floats(RouterForm, router)),
            }
        )

    @property
    def scored(self) -> int:
        """How many scores a router gives: one a granule, or one an expert to merge."""
        return self.merge or self.width // self.granule

    @property
    def width(self) -> int:
        """How many neurons the engine holds."""
        return self.kept_neurons or self.intermediate_size

    @property
    def needs_arrays(self) -> bool:
        """Whether JSON does not hold all of it."""
        return self.router is not None or self.kept_neurons is not None or self.reordered or self.adapter_rank is not None


def layer_attributes(layer: LayerPlan, score: str, rule: str) -> SparseFFNAttributes:
    """The op's attributes for a layer; whether there are biases is the model's affair."""
    stat = score == "prefix" or layer.backbone_min > 0.0 or layer.prior_gamma > 0.0
    return SparseFFNAttributes(
        activation=layer.activation,
        gated=layer.gated,
        score=score,
        rule=rule,
        granule=layer.granule,
        combine=layer.combine,
        load_slope=layer.load_slope,
        load_min=layer.load_min,
        load_max=layer.load_max,
        use_stat=stat,
        backbone_min=layer.backbone_min,
        prior_gamma=layer.prior_gamma,
        emit_stat=stat,
        stat_norm=layer.stat_norm,
    )


def with_floats(kind: type[Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """Parsed JSON with a float wherever the field is one: JSON has one kind of number, and 4 is as good as 4.0."""
    real = {item.name for item in fields(kind) if item.type == "float"}
    return {name: float(item) if name in real else item for name, item in value.items()}
