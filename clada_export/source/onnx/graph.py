"""The graph of a decoder that others exported, as the passes need it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass, TopologicalSortPass

from clada_export.errors import UnsupportedModelError, UsageError
from clada_export.files.json_files import read_json
from clada_export.foreign import ONNX_GRAPH, reading
from clada_export.patches.onnx_ir_inlining import InlineFunctions
from clada_export.source.onnx.check import check_inputs
from clada_export.source.onnx.files import STORED, companions, read_onnx
from clada_export.source.onnx.growth import LONGEST_LIST, check_lists, check_values, fold_constants, longest_list
from graph_passes.matchers.common import fixed_size, rank
from graph_passes.matchers.weights import FLOATS
from graph_passes.naming import name_interface
from graph_passes.rewrite_check import require_rewritable
from graph_passes.search import FFNMiss, FFNSearch, rewritten_ffns
from graph_passes.shape_reads import HoistShapeReads

_TOKENS = ("input_ids", "attention_mask", "position_ids")
_CACHED = re.compile(r"(past_key_values|present)\.\d+\.(key|value)", re.ASCII)
_CACHE_TYPES = (*FLOATS, ir.DataType.DOUBLE, ir.DataType.INT8, ir.DataType.UINT8)
_LOGITS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
SOURCE_NAME = "clada.source_name"
"""By this the inputs and outputs of `load_graph`'s result remember what they are called in the file."""


def readable_graph(path: Path) -> ir.Model:
    """The model with what the rules look at: no functions but the op's own, and shapes of intermediate values.

    Raises:
        UsageError: damaged, or weights are missing (`clada_export.source.onnx.files`).
        UnsupportedModelError: it can't be prepared, or has values that are far larger than the file.
    """
    model = read_onnx(path)
    if not rewritten_ffns(model):
        with reading(ONNX_GRAPH, path):
            InlineFunctions()(model)
    # Some tools append the nodes that they add, which ONNX Runtime takes.
    with reading(ONNX_GRAPH, path):
        TopologicalSortPass()(model)
    check_inputs(model, path)
    check_lists(model, path)
    # Some exporters write no shapes, and leave sizes that are numbers ("half of the last axis") to be computed at run time.
    with _quiet(), reading(ONNX_GRAPH, path):
        ShapeInferencePass(data_prop=False)(model)
        if longest_list(model) <= LONGEST_LIST:
            ShapeInferencePass()(model)
    with _quiet(), reading(ONNX_GRAPH, path):
        fold_constants(model, path)
    check_values(model, model.meta[STORED], path)
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
    size = _head_size(folder, model.meta[STORED])
    for value in (*model.graph.inputs, *model.graph.outputs):
        cached = _CACHED.fullmatch(str(value.name))
        if (
            cached
            and size is not None
            and value.shape is not None
            and len(value.shape) == 4
            and fixed_size(value.shape[3]) is None
        ):
            value.shape = ir.Shape([*list(value.shape)[:3], size])


def _head_size(folder: Path, stored: int) -> int | None:
    """What the configuration of onnxruntime-genai or transformers says, if one is there.

    Raises:
        UsageError: a file that is no JSON, or a number that no head can have in a model of `stored` numbers.
    """
    for name, path in (("genai_config.json", ("model", "decoder", "head_size")), ("config.json", ("head_dim",))):
        found: Any = read_json(folder / name) if (folder / name).exists() else None
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, int) and not isinstance(found, bool):
            if not 0 < found <= stored:
                raise UsageError(f"{folder / name}: {'.'.join(path)} is {found}, and the weights hold {stored} numbers")
            return found
    return None


def _is_known(name: str) -> bool:
    return name in _TOKENS or (name.startswith("past_key_values.") and _CACHED.fullmatch(name) is not None)


def _check_interface(model: ir.Model, path: Path) -> None:
    """Raise UnsupportedModelError unless inputs and outputs are those of a text decoder with a cache of keys and values."""
    inputs = {str(value.name): value for value in model.graph.inputs}
    outputs = {str(value.name): value for value in model.graph.outputs}
    inner = {value.name for node in model.graph for value in node.outputs} - set(outputs)
    both = [*model.graph.inputs, *model.graph.outputs]
    if len({value.name for value in both}) < len(both) or not inner.isdisjoint(inputs):
        names = ", ".join(str(value.meta[SOURCE_NAME]) for value in both[:4])
        raise UnsupportedModelError(f"{path}: two inputs or outputs, or an inner value, would have one name ({names}, ...)")
    for name, value in inputs.items():
        if name in _TOKENS:
            if rank(value) not in (None, 2) or value.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
                raise UnsupportedModelError(
                    f"{path}: input {name!r} is {value.type} {value.shape}; wanted is a matrix of integers"
                )
        elif name.replace("past_key_values", "present", 1) not in outputs:
            raise UnsupportedModelError(f"{path}: the graph takes {name!r} and does not give what to pass on the next time")
        elif value.dtype not in _CACHE_TYPES:
            raise UnsupportedModelError(f"{path}: input {name!r} is {value.type}, which is no type of a cache")
    logits = outputs["logits"]
    if rank(logits) not in (None, 3) or logits.dtype not in _LOGITS:
        raise UnsupportedModelError(
            f"{path}: output 'logits' is {logits.type} {logits.shape}; wanted is [batch, sequence, vocabulary] of floats"
        )


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
        UsageError: damaged, or weights are missing (`clada_export.source.onnx.files`).
        UnsupportedModelError: not a decoder with a cache of keys and values, or an opset that is too old.
    """
    model = readable_graph(path)
    if rewritten_ffns(model):
        raise UnsupportedModelError(f"{path} was written by clada-export already; give it the model that it was made from")
    try:
        require_rewritable(model)
    except ir.passes.PreconditionError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    if not any(value.name == "logits" for value in model.graph.outputs):
        names = ", ".join(str(value.name) for value in model.graph.outputs[:4])
        raise UnsupportedModelError(f"{path}: the graph has no output 'logits'; it has {names}")
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.meta[SOURCE_NAME] = str(value.name)
    _settle_head_size(model, companions(path))
    report = name_interface(model)
    others = [name for name in map(str, (value.name for value in model.graph.inputs)) if not _is_known(name)]
    if report.unresolved or others:
        raise UnsupportedModelError(
            f"{path}: inputs that a text decoder does not have: {', '.join([*report.unresolved, *others])}"
        )
    _check_interface(model, path)
    return model
