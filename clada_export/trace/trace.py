"""The trace stage: eager model in, one ONNX graph for prompt and decode out (`transformers.exporters`).

Layers that are alike are traced once and repeated; see `docs/decisions/0013-trace.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from clada_export.decoder.ffn import plain_ffns
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.trace.example import make_example
from clada_export.trace.exporter import export_graph
from clada_export.trace.repeated import trace_repeated
from clada_export.trace.stack import WholeError, find_stack
from graph_passes.positions import ShiftPositions


@dataclass(frozen=True)
class Way:
    """How a graph was traced.

    Attributes:
        traced: how many layers the exporter saw; the others repeat some of them. None for a model traced as a whole.
        reason: why as a whole; None if it was not.
    """

    traced: int | None
    reason: str | None

    def told(self) -> str:
        """In words, for the line of the stage."""
        return f"{self.traced} layers traced, the others repeat them" if self.reason is None else f"as a whole: {self.reason}"


@dataclass(frozen=True)
class TracedModel:
    """The graph with its interface named: `input_ids`, `attention_mask`, `position_ids` where the model takes them, the cache.

    Its weights share memory with the eager model wherever the exporter leaves them as they are; what it makes of them is made
    when it is read, if layers were repeated, and else already there.

    Attributes:
        way: how it was traced; None if it was not.
    """

    graph: ir.Model
    fusions: str | None
    way: Way | None = None


def trace(decoder: TorchDecoder, *, fusions: str | None = "cpu") -> TracedModel:
    """Export a decoder with dynamic batch, sequence and past length; its FFNs as plain ones, whatever weighs their neurons.

    Args:
        decoder: float32, float16 or bfloat16; the graph computes in its type.
        fusions: `ort_fusions` of the exporter: `cpu` for ONNX Runtime on the CPU, None for plain ONNX.

    Raises:
        UnsupportedModelError: the model keeps a cache that is not keys and values, or the exporter can't trace it; says why.
    """
    with plain_ffns(decoder.model):
        graph, way = _trace(decoder, fusions)
    ShiftPositions(decoder.first_position)(graph)
    return TracedModel(graph, fusions, way)


def _trace(decoder: TorchDecoder, fusions: str | None) -> tuple[ir.Model, Way]:
    try:
        stack = find_stack(decoder.model)
        return trace_repeated(decoder, stack, fusions), Way(stack.traced, None)
    except WholeError as error:
        reason = str(error)
    return export_graph(make_example(decoder), decoder.name, fusions), Way(None, reason)
