"""`SparsityPlan`: what calibration hands to the graph passes, as JSON that a user can read, edit and pass back.

The format is documented in `docs/plan.md`. `SparsityPlan.from_dict` is where a plan becomes trusted: it follows
`PLAN_SCHEMA`, its parts fit each other and the op, and its arrays are those that its layers ask for. What only the model can
tell is checked by `clada_export.plan.fit`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from clada_export.errors import UsageError
from clada_export.files.json_files import read_json, validate_json
from clada_export.load.signal import LoadSignal
from clada_export.plan.layer import LayerPlan, layer_attributes
from clada_export.plan.layer_faults import layer_fault
from clada_export.plan.record import CalibrationRecord
from clada_export.plan.schema import PLAN_SCHEMA, PLAN_VERSION
from clada_export.plan.tensors import PLAN_TENSORS, LayerTensors, load_tensors, save_tensors, tensors_digest
from graph_passes.op import SparseFFNAttributes


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
            fault = layer_fault(layer, value["score"], value["rule"])
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
        self.save_arrays(path.parent)

    def save_arrays(self, folder: Path) -> None:
        """Write the arrays, if there are any, into a folder as `PLAN_TENSORS`, with the model's weights digest."""
        if self.arrays:
            save_tensors(folder / PLAN_TENSORS, self.arrays, str(self.source.get("weights_digest", "")))

    @classmethod
    def load_file(cls, path: Path) -> SparsityPlan:
        """Read a plan, and the arrays beside it.

        Raises:
            UsageError: the file can't be read, is not JSON, or is not a plan.
        """
        return cls.from_dict(read_json(path), origin=str(path), folder=path.parent)
