"""`--target ort`: the rewritten graph, its weights, and the ONNX Runtime custom-op library."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from clada_export.calibration.scorer import score_constants
from clada_export.errors import BackendError, UnsupportedModelError, UsageError
from clada_export.manifest import CacheTensor, TensorSpec
from clada_export.native import LIBRARY_NAME, check_library, ort_library_path
from clada_export.plan import LayerPlan, SparsityPlan
from clada_export.trace import TracedModel
from graph_passes import FFNRewrite, RewriteReport, find_ffns, rewrite_ffns
from graph_passes.reshapes import RemoveHeadReshapes

MODEL_NAME, DATA_NAME = "model.onnx", "model.onnx.data"
FUSIONS = "cpu"
WEIGHT_TYPES = {"float32": None, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class BuiltModel:
    """What the stage wrote, for the manifest. Paths are relative to the output folder."""

    model: str
    library: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache: tuple[CacheTensor, ...]
    report: RewriteReport


def require_backend() -> Path:
    """The custom-op library, checked; called before any long work.

    Raises:
        BackendError: ONNX Runtime or the library is missing, or the library has another op version.
    """
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise BackendError("--target ort needs ONNX Runtime: pip install 'clada-export[ort]'") from error
    library = ort_library_path()
    check_library(library)
    return library


def build(traced: TracedModel, plan: SparsityPlan, out: Path, *, dtype: str = "float32") -> BuiltModel:
    """Rewrite the graph and write it.

    Args:
        traced: is changed in place and must not be used again.
        plan: names the FFNs; those the graph does not have are left out and reported.
        out: an existing folder.
        dtype: element type of the FFN weights; activations stay float32.

    Raises:
        UnsupportedModelError: not one FFN of the plan is in the graph; says why.
        UsageError: a layer of the plan has other sizes than the graph.
    """
    library = require_backend()
    model = traced.graph
    expected = [layer.name for layer in plan.layers]
    search = find_ffns(model, expected)
    matched = {match.name: match for match in search.matches}
    for layer in plan.layers:
        match = matched.get(layer.name)
        if match is not None and (match.hidden_size, match.intermediate_size) != (layer.hidden_size, layer.intermediate_size):
            planned, found = (f"{item.hidden_size} x {item.intermediate_size}" for item in (layer, match))
            raise UsageError(
                f"the plan does not fit this model: {layer.name} has sizes {planned} in the plan and {found} in the model"
            )
    rewrites = {layer.name: _rewrite(plan, layer) for layer in plan.layers if layer.name in matched}
    if not rewrites:
        reasons = "; ".join(f"{miss.name}: {miss.reason}" for miss in search.misses[:3]) or "no layer of the plan is in it"
        raise UnsupportedModelError(f"no feed-forward layer was matched in the exported graph ({reasons})")
    report = rewrite_ffns(model, rewrites, emit_active=True, weight_dtype=WEIGHT_TYPES[dtype])
    # The search that named the misses ran before the pass; the pass only knows what it was asked to rewrite.
    report.misses = [*search.misses]
    RemoveHeadReshapes()(model)
    model.producer_name = "clada-export"
    _forget_machine_paths(model)
    ir.save(model, out / MODEL_NAME, external_data=DATA_NAME)
    shutil.copyfile(library, out / LIBRARY_NAME)
    return BuiltModel(
        MODEL_NAME,
        LIBRARY_NAME,
        tuple(tensor_spec(value) for value in model.graph.inputs),
        tuple(tensor_spec(value) for value in model.graph.outputs),
        cache_tensors(model),
        report,
    )


def _rewrite(plan: SparsityPlan, layer: LayerPlan) -> FFNRewrite:
    threshold = np.asarray(layer.threshold, dtype=np.float32)
    return FFNRewrite(plan.attributes(layer), threshold, partial(score_constants, plan.score))


def tensor_spec(value: ir.Value) -> TensorSpec:
    """How the manifest describes a graph input or output."""
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ())
    assert value.name is not None and value.dtype is not None
    return TensorSpec(value.name, _numpy_name(value.dtype), shape)


def _numpy_name(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def cache_tensors(model: ir.Model) -> tuple[CacheTensor, ...]:
    """Pair `past_key_values.{i}.key` with `present.{i}.key`.

    Raises:
        UnsupportedModelError: an input of the cache that the graph does not return.
    """
    outputs = {value.name for value in model.graph.outputs}
    found = []
    for value in model.graph.inputs:
        name = value.name or ""
        if not name.startswith("past_key_values."):
            continue
        _, layer, role = name.split(".")
        present = f"present.{layer}.{role}"
        if present not in outputs:
            raise UnsupportedModelError(f"the graph takes {name} and does not return {present}")
        spec = tensor_spec(value)
        found.append(CacheTensor(int(layer), role, name, present, spec.dtype, spec.shape))
    return tuple(found)


def _forget_machine_paths(model: ir.Model) -> None:
    """Drop stack traces: they name files of the machine that exported, and make the file larger."""
    nodes: list[Any] = list(model.graph)
    for function in model.functions.values():
        nodes += list(function)
    for node in nodes:
        for key in [key for key in node.metadata_props if "stack_trace" in key]:
            del node.metadata_props[key]
