"""The graph of a decoder that others exported, as the passes need it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass, ShapeInferencePass, TopologicalSortPass
from onnxscript.optimizer import fold_constants

from clada_export.errors import UnsupportedModelError
from clada_export.onnx_source.files import companions, read_onnx
from clada_export.plan import read_json
from graph_passes.naming import name_interface
from graph_passes.rewrite import RewriteFFNs
from graph_passes.rules.common import fixed_size
from graph_passes.search import FFNMiss, FFNSearch, rewritten_ffns
from graph_passes.shape_reads import HoistShapeReads

SOURCE_NAME = "clada.source_name"
"""By this the inputs and outputs of `load_graph`'s result remember what they are called in the file."""


def readable_graph(path: Path) -> ir.Model:
    """The model with what the rules look at: no functions but the op's own, and shapes of intermediate values.

    Raises:
        UsageError: damaged, or weights are missing (`clada_export.onnx_source.files`).
    """
    model = read_onnx(path)
    if not rewritten_ffns(model):
        InlinePass()(model)
    # Some tools append the nodes that they add, which ONNX Runtime takes.
    TopologicalSortPass()(model)
    # Some exporters write no shapes, and leave sizes that are numbers ("half of the last axis") to be computed at run time.
    with _quiet():
        ShapeInferencePass()(model)
        fold_constants(model, onnx_shape_inference=True)
    HoistShapeReads()(model)
    RemoveUnusedNodesPass()(model)
    for value in (value for node in model.graph for value in node.outputs):
        if value.shape is not None and any(_invented(size) for size in value.shape):
            value.shape = ir.Shape([None if _invented(size) else size for size in value.shape])
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep both tools from logging what they can't infer: the rules say what they miss, where it matters."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnx_ir.passes.common.shape_inference", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _settle_head_size(model: ir.Model, folder: Path) -> None:
    """Write the size of a head into the cache's shapes where the graph has a name for it, and a file beside it the number."""
    size = _head_size(folder)
    for value in (*model.graph.inputs, *model.graph.outputs):
        cached = re.fullmatch(r"(past_key_values|present)\.\d+\.(key|value)", str(value.name))
        if (
            cached
            and size is not None
            and value.shape is not None
            and len(value.shape) == 4
            and fixed_size(value.shape[3]) is None
        ):
            value.shape = ir.Shape([*list(value.shape)[:3], size])


def _head_size(folder: Path) -> int | None:
    """What the configuration of onnxruntime-genai or transformers says, if one is there."""
    for name, path in (("genai_config.json", ("model", "decoder", "head_size")), ("config.json", ("head_dim",))):
        found: Any = read_json(folder / name) if (folder / name).is_file() else None
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, int):
            return found
    return None


def _invented(size: int | ir.SymbolicDim) -> bool:
    """Whether a size is a name that shape inference made up: it says nothing about being equal to another."""
    return isinstance(size, ir.SymbolicDim) and str(size.value).startswith("unk__")


def compilable_ffns(search: FFNSearch) -> FFNSearch:
    """The FFNs that can be calibrated: those in float32; the others are misses with that reason, after those of the search.

    ONNX Runtime's CPU provider moves the Casts around operators in 16 bits by what lies beside them, so that a graph in parts
    differs from the whole by rounding, and nothing could be held to it closely.
    """
    reason = "it computes in 16 bits ({}): an ONNX model as source has to be in float32"
    narrow = [match for match in search.matches if match.dtype != ir.DataType.FLOAT]
    return FFNSearch(
        [match for match in search.matches if match.dtype == ir.DataType.FLOAT],
        [*search.misses, *(FFNMiss(match.name, reason.format(match.dtype.name.lower())) for match in narrow)],
    )


def load_graph(path: Path) -> ir.Model:
    """A decoder's graph with its interface named, ready for the passes; weights are not read.

    Raises:
        UsageError: damaged, or weights are missing (`clada_export.onnx_source.files`).
        UnsupportedModelError: not a decoder with a cache of keys and values, or an opset that is too old.
    """
    model = readable_graph(path)
    if rewritten_ffns(model):
        raise UnsupportedModelError(f"{path} was written by clada-export already; give it the model that it was made from")
    try:
        RewriteFFNs({}).requires(model)
    except ir.passes.PreconditionError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    if not any(value.name == "logits" for value in model.graph.outputs):
        names = ", ".join(str(value.name) for value in model.graph.outputs[:4])
        raise UnsupportedModelError(f"{path}: the graph has no output 'logits'; it has {names}")
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.meta[SOURCE_NAME] = str(value.name)
    _settle_head_size(model, companions(path))
    report = name_interface(model)
    known = {"input_ids", "attention_mask", "position_ids"}
    others = [
        str(value.name) for value in model.graph.inputs if value.name not in known and "past_key_values." not in str(value.name)
    ]
    if report.unresolved or others:
        raise UnsupportedModelError(
            f"{path}: inputs that a text decoder does not have: {', '.join([*report.unresolved, *others])}"
        )
    return model
