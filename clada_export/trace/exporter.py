"""Call the exporter of transformers, and name the interface of the graph that it makes."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from clada_export.errors import UnsupportedModelError
from clada_export.patches.onnxscript_matcher import early_reject
from clada_export.patches.onnxscript_optimizer import before_optimising
from clada_export.trace.example import TOKENS, Example
from clada_export.trace.quiet import first_line, quiet
from graph_passes.naming import name_interface

FAILURES = (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError, torch.onnx.errors.OnnxExporterError)
"""What the exporter raises of models that it can't trace."""

Look = Callable[[ir.Graph], None]
"""Is shown the translated graph before it is optimised, and may change its initializers."""


def export_graph(example: Example, name: str, fusions: str | None, look: Look | None = None) -> ir.Model:
    """Trace, translate, optimise; then settle names.

    Args:
        name: of the model, for messages.
        fusions: `ort_fusions` of the exporter.

    Raises:
        UnsupportedModelError: the exporter can't trace it, or its cache is not keys and values of every token.
    """
    config = OnnxConfig(dynamic=True, dynamic_shapes=example.shapes, ort_fusions=fusions)  # type: ignore[arg-type]
    with quiet(), early_reject(), before_optimising(look):
        try:
            exported = OnnxExporter().export(example.component, example.inputs, config=config)  # type: ignore[no-untyped-call,arg-type]
        except FAILURES as error:
            raise UnsupportedModelError(f"{name}: transformers.exporters can't trace it: {first_line(error)}") from error
    graph: ir.Model = exported.program
    report = name_interface(graph)
    # A name that was not settled is the exporter's own, with dots where its arguments are nested.
    strange = [str(value.name) for value in graph.graph.inputs if str(value.name).startswith("input.")]
    if unresolved := list(dict.fromkeys((*report.unresolved, *strange))):
        raise UnsupportedModelError(f"{name}: its cache has inputs that are neither keys nor values: {', '.join(unresolved)}")
    if report.truncated_layers:
        raise UnsupportedModelError(
            f"{name}: layers {report.truncated_layers} drop tokens in the traced graph: their sliding window is shorter than "
            f"{TOKENS + 2} tokens"
        )
    return graph
