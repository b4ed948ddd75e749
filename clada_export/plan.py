"""`SparsityPlan`: what calibration hands to the graph passes, as JSON that a user can read, edit and pass back.

The format is documented in `docs/plan.md`; `PLAN_SCHEMA` is checked whenever a plan is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jsonschema

from clada_export.errors import UsageError
from clada_export.load_rules import RULES as LOAD_RULES
from clada_export.load_rules import make_rule
from clada_export.plan_tensors import PLAN_TENSORS, LayerTensors, load_tensors, save_plan_tensors, tensors_digest
from graph_passes.op import ACTIVATIONS, COMBINES, RULES, SCORES, STAT_NORMS, SparseFFNAttributes
from graph_passes.router import DENSE_ROWS, HIDDEN_ACTIVATIONS, OUTPUTS, Router

PLAN_VERSION = 1

_NUMBER = {"type": "number"}
_NON_NEGATIVE = {"type": "number", "minimum": 0}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}

PLAN_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "clada-export sparsity plan",
    "type": "object",
    "required": ["version", "policy", "score", "rule", "layers", "load", "source"],
    "additionalProperties": False,
    "properties": {
        "version": {"const": PLAN_VERSION},
        "policy": {"type": "string"},
        "score": {"enum": list(SCORES)},
        "rule": {"enum": list(RULES)},
        "layers": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "activation", "gated", "hidden_size", "intermediate_size", "threshold"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string", "minLength": 1},
                    "activation": {"enum": list(ACTIVATIONS)},
                    "gated": {"type": "boolean"},
                    "hidden_size": {"type": "integer", "minimum": 1},
                    "intermediate_size": {"type": "integer", "minimum": 1},
                    "threshold": {"type": "array", "minItems": 1, "items": _NON_NEGATIVE},
                    "load_slope": _NUMBER,
                    "load_min": {"type": "number", "exclusiveMinimum": 0},
                    "load_max": {"type": "number", "exclusiveMinimum": 0},
                    "granule": {"type": "integer", "minimum": 1},
                    "combine": {"enum": list(COMBINES)},
                    "backbone_min": _NON_NEGATIVE,
                    "prior_gamma": _NON_NEGATIVE,
                    "stat_norm": {"enum": list(STAT_NORMS)},
                    "kept_neurons": {"type": ["integer", "null"], "minimum": 1},
                    "reordered": {"type": "boolean"},
                    "router": {
                        "type": ["object", "null"],
                        "required": ["layers", "hidden", "output", "normalise", "scale"],
                        "additionalProperties": False,
                        "properties": {
                            "layers": {"type": "integer", "minimum": 1},
                            "hidden": {"enum": list(HIDDEN_ACTIVATIONS)},
                            "output": {"enum": list(OUTPUTS)},
                            "normalise": {"type": "boolean"},
                            "scale": {"type": "number", "exclusiveMinimum": 0},
                            "k": {"type": ["integer", "null"], "minimum": 1},
                            "dense_rows": {"enum": list(DENSE_ROWS)},
                        },
                    },
                    "merge": {"type": ["integer", "null"], "minimum": 2},
                    "adapter_rank": {"type": ["integer", "null"], "minimum": 1},
                    "expected_sparsity": _SHARE,
                    "expected_cett": _NON_NEGATIVE,
                },
            },
        },
        "load": {
            "type": "object",
            "required": [
                "surprisal_mean",
                "surprisal_std",
                "entropy_mean",
                "entropy_std",
                "surprisal_weight",
                "entropy_weight",
            ],
            "additionalProperties": False,
            "properties": {
                "surprisal_mean": _NUMBER,
                "surprisal_std": {"type": "number", "exclusiveMinimum": 0},
                "entropy_mean": _NUMBER,
                "entropy_std": {"type": "number", "exclusiveMinimum": 0},
                "surprisal_weight": _NUMBER,
                "entropy_weight": _NUMBER,
                "rule": {"enum": list(LOAD_RULES)},
                "parameters": {"type": "object", "additionalProperties": _NUMBER},
                "momentum": _SHARE,
                "slope": {"type": "number", "exclusiveMinimum": 0},
            },
        },
        "source": {
            "type": "object",
            "required": ["weights_digest"],
            "properties": {"weights_digest": {"type": "string"}},
        },
        "calibration": {"type": "object"},
        "prune": {"type": ["string", "null"]},
        "tensors": {
            "type": ["object", "null"],
            "required": ["file", "sha256"],
            "additionalProperties": False,
            "properties": {
                "file": {"type": "string", "pattern": "^[A-Za-z0-9._-]+$"},
                "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
            },
        },
    },
}


@dataclass(frozen=True)
class LoadSignal:
    """Statistics, weights and rule of the load; surprisal S and entropy H in nats, from raw logits.

    drive = surprisal_weight * (S - surprisal_mean) / surprisal_std + entropy_weight * (H - entropy_mean) / entropy_std, and
    `rule` with its `parameters` makes the load of it (`clada_export.load_rules`); `exp`, the default, is clip(drive, -4, 4).
    `momentum` b above 0 lets means and deviations follow the text: mean <- mean + b (value - mean). `slope` turns the
    multiplier that a rule wants into a load; it is the `load_slope` of a layer that follows the rule exactly.
    """

    surprisal_mean: float = 0.0
    surprisal_std: float = 1.0
    entropy_mean: float = 0.0
    entropy_std: float = 1.0
    surprisal_weight: float = 1.0
    entropy_weight: float = 0.0
    rule: str = "exp"
    parameters: dict[str, float] = field(default_factory=dict)
    momentum: float = 0.0
    slope: float = 0.25

    @classmethod
    def from_dict(cls, value: dict[str, Any], origin: str) -> LoadSignal:
        """Read what follows the schema.

        Args:
            origin: where it came from, for the message.

        Raises:
            UsageError: the rule does not have one of the parameters, or not this value.
        """
        signal = cls(**value)
        try:
            make_rule(signal.rule, signal.parameters)
        except ValueError as error:
            raise UsageError(f"{origin}: {error}") from error
        return signal


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
                **value,
                "threshold": tuple(float(t) for t in value["threshold"]),
                "router": None if router is None else RouterForm(**router),
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
    calibration: dict[str, Any] = field(default_factory=dict)
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
        names = [layer.name for layer in layers]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise UsageError(f"{origin}: layer {repeated[0]!r} is planned twice")
        for layer in layers:
            if layer.load_min > layer.load_max:
                raise UsageError(
                    f"{origin}: layer {layer.name!r} has load_min {layer.load_min} above load_max {layer.load_max}"
                )
            if layer.width % layer.granule:
                raise UsageError(
                    f"{origin}: layer {layer.name!r} has {layer.width} neurons, which granules of {layer.granule} do not divide"
                )
            if layer.merge is not None and (layer.width % layer.merge or layer.router is None):
                raise UsageError(
                    f"{origin}: layer {layer.name!r} merges {layer.merge} experts: they must divide its {layer.width} neurons, "
                    "and it must have a router"
                )
            if (
                value["rule"] == "topk"
                and not 1 <= min(layer.threshold) <= max(layer.threshold) <= layer.width // layer.granule
            ):
                raise UsageError(
                    f"{origin}: layer {layer.name!r} has k = {layer.threshold[0]:g} (the threshold of rule topk); it must "
                    f"be between 1 and {layer.width // layer.granule}, the number of granules"
                )
        tensors = value.get("tensors")
        known = {key: item for key, item in value.items() if key != "tensors"}
        plan = cls(**{**known, "layers": layers, "load": LoadSignal.from_dict(value["load"], f"{origin}: load")})
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


def read_json(path: Path) -> Any:
    """Parse a JSON file; NaN and infinities are refused, as JSON has neither.

    Raises:
        UsageError: the file can't be read or is not JSON.
    """

    def refuse(token: str) -> float:
        raise ValueError(f"{token} is not JSON")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON: {error}") from error


def validate_json(value: Any, schema: dict[str, Any], origin: str) -> None:
    """Check a parsed JSON value against a schema, numbers for being finite included.

    Raises:
        UsageError: names the place of the first fault, the value found and what is allowed.
    """
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(value))
    if error is not None:
        place = "/".join(str(part) for part in error.absolute_path) or "(top level)"
        raise UsageError(f"{origin}: {place}: {error.message}")
    _refuse_non_finite(value, origin, "")


def _refuse_non_finite(value: Any, origin: str, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{origin}: {place}: {value} is not a finite number")
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_non_finite(item, origin, f"{place}/{key}" if place else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_non_finite(item, origin, f"{place}/{index}")
