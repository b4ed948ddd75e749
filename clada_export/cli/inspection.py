"""What would be rewritten in a model, and why not the rest, without an export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.torch_decoder import require_torch
from clada_export.price import ModelSize
from clada_export.price.outline import outline
from clada_export.price.room import size_of
from clada_export.source.load import load_source, source_request
from clada_export.source.onnx.graph import compilable_ffns, readable_graph
from clada_export.trace.trace import trace
from graph_passes.matchers.common import FFNMatch
from graph_passes.rewrite_check import require_rewritable
from graph_passes.search import FFNSearch, find_ffns, rewritten_ffns

_UNTRACED = "layers of the PyTorch model; --trace exports the graph too, and matches it"


@dataclass(frozen=True)
class LayerFinding:
    """One layer: whether it would be rewritten; `form` and sizes if so, else the reason why it stays as it is."""

    name: str
    rewritten: bool
    form: str = ""
    hidden_size: int = 0
    intermediate_size: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Inspection:
    """What was looked at (`model` or `graph`), its name, its layers in order, what concerns all of them, and its size."""

    what: str
    name: str
    layers: tuple[LayerFinding, ...]
    notes: tuple[str, ...] = field(default=())
    size: ModelSize | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        return asdict(self)


def inspect_onnx(path: Path) -> Inspection:
    """Look at an ONNX model; its weights are not read.

    Raises:
        UsageError: it is damaged, or weights are missing (`clada_export.source.onnx.files`).
    """
    model = readable_graph(path)
    done = [LayerFinding(name, False, reason="it is a SparseFFN node already") for name in sorted(rewritten_ffns(model))]
    search = compilable_ffns(find_ffns(model))
    size = ModelSize.of_graph(model, search.matches)
    return Inspection("graph", str(path), (*_layers(search), *done), tuple(_graph_notes(model)), size)


def inspect_model(model: str, *, traced: bool = False, **source_options: Any) -> Inspection:
    """Look at a model as `clada-export` takes it.

    Its weights are not read, unless it is traced or only they tell what it is: what an FFN computes does not depend on them.

    Args:
        traced: trace it too, and match the graph. Without it the layers are those that the PyTorch model has.
        source_options: of `load_source`.

    Raises:
        UsageError, UnsupportedModelError, BackendError: see `load_source` and `trace`.
    """
    if not traced and (found := outline(source_request(model, **source_options))) is not None:
        decoder: Decoder = found.decoder()
        size = ModelSize.of_model(found.model, decoder.ffns, found.stored)
        return Inspection("model", found.name, tuple(_eager_layers(decoder)), (_UNTRACED,), size)
    source = load_source(model, **source_options)
    decoder = source.decoder
    size = size_of(source)
    if not traced:
        return Inspection("model", source.name, tuple(_eager_layers(decoder)), (_UNTRACED, *source.warnings), size)
    graph = trace(require_torch(decoder, "--trace")).graph
    search = find_ffns(graph, expected=[ffn.name for ffn in decoder.ffns])
    left = (LayerFinding(item.name, False, reason=item.reason) for item in decoder.skipped)
    return Inspection("model", source.name, (*_layers(search), *left), tuple(source.warnings), size)


def _eager_layers(decoder: Decoder) -> Iterator[LayerFinding]:
    for ffn in decoder.ffns:
        form = ffn.activation + (", gated" if ffn.gated else "") + (f", packed in {ffn.packing}" if ffn.packing else "")
        yield LayerFinding(ffn.name, True, form, ffn.hidden_size, ffn.intermediate_size)
    for item in decoder.skipped:
        yield LayerFinding(item.name, False, reason=item.reason)


def _layers(search: FFNSearch) -> Iterator[LayerFinding]:
    for match in search.matches:
        yield LayerFinding(match.name, True, _form(match), match.hidden_size, match.intermediate_size)
    for miss in search.misses:
        yield LayerFinding(miss.name, False, reason=miss.reason)


def _form(match: FFNMatch) -> str:
    weights = "Gemm" if any(node.op_type == "Gemm" for node in match.nodes) else "MatMul"
    parts = [match.kind, match.dtype.name.lower(), f"{len(match.nodes)} nodes ({weights})"]
    return ", ".join([*parts, "biases"] if match.has_bias else parts)


def _graph_notes(model: ir.Model) -> Iterator[str]:
    yield f"opset {model.graph.opset_imports.get('', 'unknown')}, {model.graph.num_nodes()} nodes"
    if model.producer_name:
        yield f"written by {model.producer_name} {model.producer_version or ''}".rstrip()
    try:
        require_rewritable(model)
    except ir.passes.PreconditionError as error:
        yield f"it can't be rewritten as it is: {error}"
