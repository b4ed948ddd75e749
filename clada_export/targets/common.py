"""What the targets share: their interface, how their passes are run, and how a graph's inputs and outputs are described."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from clada_export.artifact.manifest import CacheTensor, Manifest, TensorSpec
from clada_export.decoder.decoder import Decoder
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UnsupportedModelError
from clada_export.op.scorer import score_constants
from clada_export.plan.fit import require_same
from clada_export.plan.layer import LayerPlan
from clada_export.plan.plan import SparsityPlan
from clada_export.targets.options import TensorRTOptions
from clada_export.trace.trace import TracedModel
from clada_export.verify import QuantisedWeights, Verification
from graph_passes.dead_columns import DropDeadColumns
from graph_passes.fuse_attention import TOKEN_AXIS, in_place_node
from graph_passes.op import ContractError
from graph_passes.pass_list import PassList
from graph_passes.quant.quantiser import Quantiser
from graph_passes.quant_matmul import QuantReport
from graph_passes.report import RewriteReport
from graph_passes.rewrite import FFNRewrite, RewriteFFNs
from graph_passes.search import find_ffns

MODEL_NAME, DATA_NAME = "model.onnx", "model.onnx.data"
WEIGHT_TYPES = {"float32": None, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}

Step = Callable[[str, int, int], None]
"""Progress within a stage: what, how many are done, how many there are (0: not known)."""


@dataclass(frozen=True)
class BuildRequest:
    """What a target builds from.

    Attributes:
        traced: is changed in place and must not be used again.
        plan: names the FFNs; those the graph does not have are left out and reported.
        out: an existing folder.
        dtype: element type of the FFN weights (`ort`) or of the whole model (`trt`).
        limit: the longest sequence that the model takes, or None if it does not say.
        scales: of the model's attention layers, as far as it says them.
        settings: what was asked of TensorRT.
        portable: attention stays in standard operators.
        quantiser: of the matrices, or None where weights are numbers of a type.
    """

    traced: TracedModel
    plan: SparsityPlan
    out: Path
    dtype: str = "float32"
    limit: int | None = None
    scales: frozenset[float] = frozenset()
    settings: TensorRTOptions | None = None
    portable: bool = False
    quantiser: Quantiser | None = None
    progress: Step = lambda what, done, total: None


@dataclass(frozen=True)
class BuiltModel:
    """What the stage wrote, for the manifest. Paths are relative to the output folder; `engine` is the manifest's field."""

    model: str
    library: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache: tuple[CacheTensor, ...]
    report: RewriteReport
    engine: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    products: QuantReport | None = None


@dataclass(frozen=True)
class Subject:
    """What verification holds together: an export folder and the decoder, its weights rounded as the engine's are.

    Attributes:
        text: int64 [windows, context] that calibration did not see, or None.
        limits: the plan's budget for drift (`ppl_increase`, `kl`).
        weights: how the engine's weights are quantised, or None if they are not.
    """

    folder: Path
    manifest: Manifest
    decoder: Decoder
    text: np.ndarray | None
    limits: dict[str, float] = field(default_factory=dict)
    progress: Callable[[str], None] = lambda what: None
    weights: QuantisedWeights | None = None


class Target(Protocol):
    """A module of `clada_export.targets`. `packages` are those whose versions the manifest keeps; `fusions` is `trace`'s."""

    @property
    def FUSIONS(self) -> str | None: ...  # noqa: N802

    @property
    def PACKAGES(self) -> tuple[str, ...]: ...  # noqa: N802

    def require_backend(self, settings: TensorRTOptions | None, verify: bool) -> None:
        """Refuse, before any long work, options that this target does not have and a machine that lacks what it needs.

        Raises:
            UsageError, BackendError: the latter says what to install.
        """

    def round_weights(self, decoder: Decoder, dtype: str) -> str:
        """Round, in place, the weights that the engine stores in another type. Returns a sentence for the manifest."""

    def traceable(self, decoder: TorchDecoder, dtype: str) -> TorchDecoder:
        """What to trace: the same or a copy in another type."""

    def build(self, request: BuildRequest) -> BuiltModel:
        """Write the graph and everything that runs it.

        Raises:
            UnsupportedModelError, UsageError, BackendError.
        """

    def verify(self, subject: Subject) -> Verification:
        """Check a new export on this machine."""

    def verify_saved(self, folder: Path, manifest: Manifest) -> Verification | None:
        """Check an export against what was saved with it; None if nothing was, so that the source model is needed."""

    def verify_deployed(self, subject: Subject) -> Verification:
        """Check an export as it runs, against its source model."""


def ffn_rewrite(request: BuildRequest) -> RewriteFFNs:
    """The pass that replaces the plan's FFNs in the traced graph by op nodes. The graph is searched here, once.

    Raises:
        UnsupportedModelError: not one FFN of the plan is in the graph; says why.
        UsageError: a layer of the plan is another FFN in the graph.
    """
    plan = request.plan
    search = find_ffns(request.traced.graph, [layer.name for layer in plan.layers])
    matched = {match.name: match for match in search.matches}
    for layer in plan.layers:
        match = matched.get(layer.name)
        if match is not None:
            require_same(layer, match.activation, match.gated, match.hidden_size, match.intermediate_size, "the exported graph")
    rewrites = {layer.name: _rewrite(plan, layer) for layer in plan.layers if layer.name in matched}
    if not rewrites:
        reasons = "; ".join(f"{miss.name}: {miss.reason}" for miss in search.misses[:3]) or "no layer of the plan is in it"
        raise UnsupportedModelError(f"no feed-forward layer was matched in the exported graph ({reasons})")
    if request.quantiser is not None and (missing := [layer.name for layer in plan.layers if layer.name not in matched]):
        # Its products would be taken for attention's, with other bits than those that were calibrated.
        reason = next((miss.reason for miss in search.misses if miss.name == missing[0]), "the graph has no such layer")
        raise UnsupportedModelError(
            f"{missing[0]}: not matched in the exported graph ({reason}), and quantised weights need every feed-forward layer "
            "of the plan there; use --weights float32"
        )
    return RewriteFFNs(
        rewrites, search, emit_active=True, weight_dtype=WEIGHT_TYPES[request.dtype], quantiser=request.quantiser
    )


def run_passes(request: BuildRequest, rewrite: RewriteFFNs, passes: PassList) -> RewriteReport:
    """Run a target's passes on the traced graph, in place.

    Returns:
        What `rewrite`, one of them, did; nodes are counted after `DropDeadColumns`, which ends it.

    Raises:
        UnsupportedModelError: the graph is not what a pass requires.
    """
    try:
        passes(request.traced.graph)
    except ir.passes.PreconditionError as error:
        raise UnsupportedModelError(f"the graph can't be compiled: {error}") from error
    rewrite.report.nodes_after = passes.node_counts[DropDeadColumns.__name__]
    return rewrite.report


def save(model: ir.Model, out: Path) -> None:
    """Write `model.onnx` and its weights.

    Raises:
        UnsupportedModelError: weights that are made when they are written, and that the op does not take; names them.
    """
    model.producer_name = "clada-export"
    try:
        ir.save(model, out / MODEL_NAME, external_data=DATA_NAME)
    except ContractError as error:
        raise UnsupportedModelError(f"the graph can't be written: {error}") from error


def _rewrite(plan: SparsityPlan, layer: LayerPlan) -> FFNRewrite:
    threshold = np.asarray(layer.threshold, dtype=np.float32)
    tensors = plan.tensors(layer)
    constants = partial(score_constants, plan.score)
    return FFNRewrite(plan.attributes(layer), threshold, constants, tensors.router, tensors.neurons, layer.merge)


def tensor_spec(value: ir.Value) -> TensorSpec:
    """How the manifest describes a graph input or output."""
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ())
    assert value.name is not None and value.dtype is not None
    return TensorSpec(value.name, _numpy_name(value.dtype), shape)


def _numpy_name(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def cache_tensors(model: ir.Model) -> tuple[CacheTensor, ...]:
    """Pair `past_key_values.{i}.key` with `present.{i}.key`, `past_stat.{i}` with `present_stat.{i}`, and
    `past_merged.{i}.in` and `.out` with `present_merged.{i}.in` and `.out`. Keys and values that only one node reads, which can
    write behind them, may be updated in place.

    Raises:
        UnsupportedModelError: an input of the cache that the graph does not return.
    """
    outputs = {value.name for value in model.graph.outputs}
    found = []
    for value in model.graph.inputs:
        name = value.name or ""
        if name.startswith("past_key_values."):
            _, layer, role = name.split(".")
            present = f"present.{layer}.{role}"
        elif name.startswith("past_stat."):
            layer, role = name.split(".")[1], "stat"
            present = f"present_stat.{layer}"
        elif name.startswith("past_merged."):
            _, layer, part = name.split(".")
            role, present = f"merged_{part}", f"present_merged.{layer}.{part}"
        else:
            continue
        if present not in outputs:
            raise UnsupportedModelError(f"the graph takes {name} and does not return {present}")
        spec = tensor_spec(value)
        grows = TOKEN_AXIS if in_place_node(value) is not None else None
        found.append(CacheTensor(int(layer), role, name, present, spec.dtype, spec.shape, grows))
    return tuple(found)
