"""The graph of a decoder that others exported, as the passes need it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from clada_export.errors import UnsupportedModelError
from clada_export.onnx_source.files import read_onnx
from graph_passes.naming import name_interface
from graph_passes.rewrite import RewriteFFNs
from graph_passes.search import rewritten_ffns


def load_graph(path: Path) -> ir.Model:
    """A decoder's graph with its interface named, ready for the passes; weights are not read.

    Raises:
        UsageError: damaged, or weights are missing (`clada_export.onnx_source.files`).
        UnsupportedModelError: not a decoder with a cache of keys and values, or an opset that is too old.
    """
    model = read_onnx(path)
    if rewritten_ffns(model):
        raise UnsupportedModelError(f"{path} was written by clada-export already; give it the model that it was made from")
    try:
        RewriteFFNs({}).requires(model)
    except ir.passes.PreconditionError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    if not any(value.name == "logits" for value in model.graph.outputs):
        names = ", ".join(str(value.name) for value in model.graph.outputs[:4])
        raise UnsupportedModelError(f"{path}: the graph has no output 'logits'; it has {names}")
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
