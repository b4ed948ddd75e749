"""`SparsityPlan`: what calibration hands to the graph passes, as JSON that a user can read, edit and pass back.

The format is documented in `docs/plan.md`. `SparsityPlan.from_dict` is where a plan becomes trusted: it follows
`PLAN_SCHEMA`, its parts fit each other and the op, and its arrays are those that its layers ask for. What only the model can
tell is checked by `clada_export.plan.fit`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from clada_export.errors import UsageError
from clada_export.files.json_files import read_json, validate_json
from clada_export.load.signal import LoadSignal
from clada_export.plan.record import CalibrationRecord
from clada_export.plan.schema import PLAN_SCHEMA, PLAN_VERSION
from clada_export.plan.tensors import PLAN_TENSORS, LayerTensors, load_tensors, save_plan_tensors, tensors_digest
from graph_passes.op import ContractError, SparseFFNAttributes, weight_shapes
from graph_passes.router import Router

__all__ = [
    "PLAN_SCHEMA",
    "PLAN_VERSION",
    "LayerPlan",
    "RouterForm",
    "SparsityPlan",
    "layer_attributes",
    "read_json",
    "validate_json",
]


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
    granules. `merge` is the number of experts whose weights are merged for each segment (policy `lory`), or None; the router
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
                **_floats(cls, value),
                "threshold": tuple(float(t) for t in value["threshold"]),
                "router": None if router is None else RouterForm(**_floats(RouterForm, router)),
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


@dataclass(frozen=True)
class SparsityPlan:
    """Which neurons every FFN may skip, and how that follows the load.

    `prune` says how the weights were pruned before (`docs/pruning.md`). `arrays` holds, by layer, what JSON does not.
    """

    policy: str
    score: str
    rule: str
    layers: tuple[LayerPlan, ...]
    load: LoadSignal
    source: dict[str, Any]
    calibration: CalibrationRecord = field(default_factory=CalibrationRecord)
    prune: str | None = None
    arrays: dict[str, LayerTensors] = field(default_factory=dict, compare=False)
    version: int = PLAN_VERSION

    def layer(self, name: str) -> LayerPlan | None:
        """The plan of the FFN called `name`, or None."""
        return next((layer for layer in self.layers if layer.name == name), None)

    def attributes(self, layer: LayerPlan) -> SparseFFNAttributes:
        """The op's attributes for a layer of this plan; whether there are biases is the model's affair."""
        return layer_attributes(layer, self.score, self.rule)

    def tensors(self, layer: LayerPlan) -> LayerTensors:
        """The arrays of a layer; none for most policies."""
        return self.arrays.get(layer.name, LayerTensors())

    @property
    def expected_sparsity(self) -> float:
        """Share of all planned neurons that is skipped at load 0."""
        total = sum(layer.width for layer in self.layers)
        skipped = sum(layer.width * layer.expected_sparsity for layer in self.layers)
        return skipped / total if total else 0.0

    def with_layers(self, layers: tuple[LayerPlan, ...]) -> SparsityPlan:
        """The same plan with other layers."""
        return replace(self, layers=layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `arrays` are stood for by the digest of the file that `save_tensors` writes."""
        value = asdict(replace(self, arrays={}))
        del value["arrays"]
        value["calibration"] = self.calibration.to_dict()
        value["layers"] = [{**layer, "threshold": list(layer["threshold"])} for layer in value["layers"]]
        value["tensors"] = {"file": PLAN_TENSORS, "sha256": tensors_digest(self.arrays)} if self.arrays else None
        return value

    @classmethod
    def from_dict(cls, value: Any, *, origin: str = "plan", folder: Path | None = None) -> SparsityPlan:
        """Read a plan.

        Args:
            value: parsed JSON.
            origin: the file it came from, for the message.
            folder: where the file of its arrays is; None leaves them out.

        Raises:
            UsageError: the value does not follow `PLAN_SCHEMA`, or the arrays do not belong to it; says where, what was found
                and what is allowed.
        """
        validate_json(value, PLAN_SCHEMA, origin)
        layers = tuple(LayerPlan.from_dict(layer) for layer in value["layers"])
        repeated = [name for name, count in Counter(layer.name for layer in layers).items() if count > 1]
        if repeated:
            raise UsageError(f"{origin}: layer {repeated[0]!r} is planned twice")
        for layer in layers:
            fault = _fault(layer, value["score"], value["rule"])
            if fault is None and layer.needs_arrays and value.get("tensors") is None:
                fault = "has a router, an order of neurons or adapters, and the plan names no file of arrays ('tensors')"
            if fault is not None:
                raise UsageError(f"{origin}: layer {layer.name!r} {fault}")
        tensors = value.get("tensors")
        try:
            calibration = CalibrationRecord.from_dict(value.get("calibration", {}))
        except UsageError as error:
            raise UsageError(f"{origin}: {error}") from error
        known = {key: item for key, item in value.items() if key != "tensors"}
        load = LoadSignal.from_dict(value["load"], f"{origin}: load")
        plan = cls(**{**known, "layers": layers, "load": load, "calibration": calibration})
        if tensors is None or folder is None:
            return plan
        return replace(plan, arrays=load_tensors(folder / tensors["file"], layers, tensors["sha256"]))

    def save(self, path: Path) -> None:
        """Write the plan as JSON, and its arrays, if any, into the file beside it that it names."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        save_plan_tensors(path.parent, self)

    @classmethod
    def load_file(cls, path: Path) -> SparsityPlan:
        """Read a plan, and the arrays beside it.

        Raises:
            UsageError: the file can't be read, is not JSON, or is not a plan.
        """
        return cls.from_dict(read_json(path), origin=str(path), folder=path.parent)


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


def _fault(layer: LayerPlan, score: str, rule: str) -> str | None:
    """What is wrong with a layer that follows the schema: its parts do not fit each other, or the op."""
    if layer.load_min > layer.load_max:
        return f"has load_min {layer.load_min} above load_max {layer.load_max}"
    if layer.width > layer.intermediate_size:
        return f"keeps {layer.width} of {layer.intermediate_size} neurons"
    if layer.width % layer.granule:
        return f"has {layer.width} neurons, which granules of {layer.granule} do not divide"
    try:
        attributes = layer_attributes(layer, score, rule)
        weight_shapes(attributes, layer.hidden_size, layer.width)
    except ContractError as error:
        return f"does not fit the op: {error}"
    if layer.merge is not None:
        return _merge_fault(layer, attributes)
    if (layer.router is not None) != (score == "external"):
        found = "there is none" if layer.router is None else f"the score is {score!r}"
        return f"is not sound: score 'external' and a router belong together, and {found}"
    return _router_fault(layer) or _threshold_fault(layer, rule)


def _merge_fault(layer: LayerPlan, attributes: SparseFFNAttributes) -> str | None:
    start = f"merges {layer.merge} experts"
    if layer.router is None or layer.width % (layer.merge or 1):
        return f"{start}: they must divide its {layer.width} neurons, and it must have a router"
    if layer.router.output != "softmax":
        return f"{start}: its router must have output 'softmax', not {layer.router.output!r}"
    if attributes.use_stat or attributes.score == "external" or attributes.rule == "topk":
        return f"{start}: that goes with no prompt statistic, no score 'external' and no rule 'topk'"
    return _router_fault(layer) or _threshold_fault(layer, attributes.rule)


def _router_fault(layer: LayerPlan) -> str | None:
    if layer.router is None:
        return None
    k, output = layer.router.k, layer.router.output
    if output != "topk_softmax":
        return None if k is None else f"has a router with k {k}, and output {output!r} has none"
    if k is None or k > layer.scored:
        return f"has a router with k {k}; output 'topk_softmax' wants 1 to {layer.scored}, the granules"
    return None


def _threshold_fault(layer: LayerPlan, rule: str) -> str | None:
    granules = layer.width // layer.granule
    if rule == "topk":
        if len(layer.threshold) != 1:
            return f"has {len(layer.threshold)} thresholds; rule topk has one, k"
        if not 1 <= layer.threshold[0] <= granules:
            return (
                f"has k = {layer.threshold[0]:g} (the threshold of rule topk); it must be between 1 and {granules}, the number "
                "of granules"
            )
    elif len(layer.threshold) not in (1, granules):
        return f"has {len(layer.threshold)} thresholds; wanted 1 or {granules}, one a granule"
    return None


def _floats(kind: type[LayerPlan | RouterForm], value: Mapping[str, Any]) -> dict[str, Any]:
    """Parsed JSON with a float wherever the field is one: JSON has one kind of number, and 4 is as good as 4.0."""
    real = {item.name for item in fields(kind) if item.type == "float"}
    return {name: float(item) if name in real else item for name, item in value.items()}
