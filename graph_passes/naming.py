"""Give a decoder graph the input and output names that runtimes expect, and one name to each symbolic size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import onnx_ir as ir

BATCH, SEQUENCE = "batch_size", "sequence_length"
PAST, TOTAL = "past_sequence_length", "total_sequence_length"

_CACHE = re.compile(r"(input|output)\.past_key_values\.layers\.(\d+)\.(\w+)")
_PARTS = {"keys": "key", "values": "value"}


@dataclass
class InterfaceReport:
    """What was renamed, and what a caller may have to decide.

    Attributes:
        renamed: old to new names of inputs and outputs.
        symbols: old to new names of symbolic sizes.
        removed: cache inputs and outputs that carried no information and are gone: what was passed through unchanged, and
            counts of past tokens, which the graph now takes from the shape of a past key.
        unresolved: inputs of the cache that are neither keys nor values and could not be removed.
        truncated_layers: layers whose present does not hold past + new tokens: the graph was traced with a past beyond the
            layer's sliding window, so it drops tokens.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    unresolved: list[str] = field(default_factory=list)
    truncated_layers: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and strings."""
        return asdict(self)


def name_interface(model: ir.Model) -> InterfaceReport:
    """Rename inputs, outputs and symbolic sizes, in place; see `NameInterface`."""
    rename = NameInterface()
    rename(model)
    return rename.report


class NameInterface(ir.passes.InPlacePass):
    """Names of the interface of a decoder graph made by `transformers.exporters`.

    Inputs: `input_ids` [batch_size, sequence_length], `attention_mask` [batch_size, total_sequence_length], `position_ids`,
    `past_key_values.{i}.key` and `.value` [batch_size, heads, past_sequence_length, head_dim]. Outputs: `logits`,
    `present.{i}.key` and `.value` [batch_size, heads, total_sequence_length, head_dim]. Sizes that the exporter found to be
    fixed but wrote as symbols become numbers. A second run changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.report = InterfaceReport()

    def requires(self, model: ir.Model) -> None:
        """The graph has an input `input_ids` with two axes."""
        if not any(
            value.name == "input_ids" and value.shape is not None and len(value.shape) == 2 for value in model.graph.inputs
        ):
            raise ir.passes.PreconditionError("the graph has no input 'input_ids' with two axes")

    def ensures(self, model: ir.Model) -> None:
        """Keys and values of the cache have their names."""
        for value in (*model.graph.inputs, *model.graph.outputs):
            if _new_name(str(value.name)) != value.name:
                raise ir.passes.PostconditionError(f"{value.name!r} is still called so")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.report = InterfaceReport()
        graph = model.graph
        _resolve_cache_scalars(graph, self.report)
        for value in (*graph.inputs, *graph.outputs):
            new = _new_name(str(value.name))
            if new != value.name:
                self.report.renamed[str(value.name)] = new
                value.name = new
        self.report.symbols = _symbols(graph)
        changed = _rename_sizes(graph, self.report.symbols)
        self.report.truncated_layers = _truncated(graph)
        return ir.passes.PassResult(model, bool(changed or self.report.renamed or self.report.removed))


def _new_name(name: str) -> str:
    match = _CACHE.fullmatch(name)
    if match is None or match[3] not in _PARTS:
        return name
    side = "past_key_values" if match[1] == "input" else "present"
    return f"{side}.{match[2]}.{_PARTS[match[3]]}"


def _resolve_cache_scalars(graph: ir.Graph, report: InterfaceReport) -> None:
    """Remove what a sliding-window layer's cache carries besides keys and values.

    Its window size is read by nothing and handed on; its count of past tokens equals the length of the past keys, because a
    graph traced inside the window keeps every token and masks those beyond the window.
    """
    outputs = {str(value.name): value for value in graph.outputs}
    for value in list(graph.inputs):
        name = str(value.name)
        match = _CACHE.fullmatch(name)
        if match is None or match[3] in _PARTS:
            continue
        if match[3] == "cumulative_length" and value.uses():
            key = _past_key(graph, match[2])
            if key is not None:
                _replace_by_past_length(graph, value, key)
        output = outputs.get(name.replace("input.", "output.", 1))
        if output is not None and _only_hands_on(value, output):
            _drop_output(graph, output)
            report.removed.append(str(output.name))
        if value.uses() or value.is_graph_output():
            report.unresolved.append(name)
        else:
            graph.inputs.remove(value)
            report.removed.append(name)
    for name, output in outputs.items():
        match = _CACHE.fullmatch(name)
        if match is not None and match[3] == "cumulative_length" and output in graph.outputs:
            _drop_output(graph, output)
            report.removed.append(name)


def _past_key(graph: ir.Graph, layer: str) -> ir.Value | None:
    for value in graph.inputs:
        if value.name in (f"input.past_key_values.layers.{layer}.keys", f"past_key_values.{layer}.key"):
            return value
    return None


def _replace_by_past_length(graph: ir.Graph, count: ir.Value, key: ir.Value) -> None:
    """Let the users of a past-token count [] or [1] read the third axis of a past key instead."""
    tape = ir.tape.Tape()
    result = tape.op("Shape", [key], {"start": 2, "end": 3}, name=f"{count.name}.length")
    if count.shape is not None and len(count.shape) == 0:
        result = tape.op("Squeeze", [result], name=f"{count.name}.scalar")
    if count.dtype not in (None, ir.DataType.INT64):
        result = tape.op("Cast", [result], {"to": int(count.dtype or 7)}, name=f"{count.name}.cast")
    result.type, result.shape = count.type, count.shape
    if graph.num_nodes():
        graph.insert_before(graph.node(0), tape.nodes)
    else:
        graph.extend(tape.nodes)
    count.replace_all_uses_with(result)


def _only_hands_on(value: ir.Value, output: ir.Value) -> bool:
    node = output.producer()
    return output is value or (node is not None and node.op_type == "Identity" and node.inputs[0] is value)


def _drop_output(graph: ir.Graph, output: ir.Value) -> None:
    graph.outputs.remove(output)
    node = output.producer()
    while node is not None and not any(value.uses() or value.is_graph_output() for value in node.outputs):
        feeding = [value.producer() for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        node = next((producer for producer in feeding if producer is not None), None)


def _symbols(graph: ir.Graph) -> dict[str, str]:
    """Old to new symbol names; the first use of a symbol decides."""
    found: dict[str, str] = {}

    def name(value: ir.Value, *wanted: str | None) -> None:
        for size, new in zip(value.shape or (), wanted, strict=False):
            if isinstance(size, ir.SymbolicDim) and new is not None and re.fullmatch(r"[A-Za-z_]\w*", size.value or ""):
                found.setdefault(str(size.value), new)

    order = {"input_ids": (BATCH, SEQUENCE), "attention_mask": (BATCH, TOTAL), "position_ids": (BATCH, SEQUENCE)}
    for value in sorted(graph.inputs, key=lambda value: value.name != "input_ids"):
        if value.name in order:
            name(value, *order[value.name])
        elif re.fullmatch(r"past_key_values\.\d+\.(key|value)", str(value.name)):
            name(value, BATCH, None, PAST, None)
    return {old: new for old, new in found.items() if old != new}


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _rename_sizes(graph: ir.Graph, symbols: dict[str, str]) -> bool:
    """Write the new names in every shape, also inside expressions, and fixed sizes as numbers."""
    changed = False
    for value in _values(graph):
        if value.shape is None:
            continue
        sizes = [size if isinstance(size, int) else _size(size.value, symbols) for size in value.shape]
        old = [size if isinstance(size, int) else size.value for size in value.shape]
        if sizes != old:
            value.shape = ir.Shape(sizes)
            changed = True
    return changed


def _size(symbol: str | None, symbols: dict[str, str]) -> int | str | None:
    if symbol is None:
        return None
    if symbol.isdecimal():
        return int(symbol)
    renamed = re.sub(r"[A-Za-z_]\w*", lambda match: symbols.get(match[0], match[0]), symbol)
    terms = sorted(term.strip() for term in renamed.split("+"))
    return TOTAL if terms == sorted((PAST, SEQUENCE)) else renamed


def _truncated(graph: ir.Graph) -> list[int]:
    layers = []
    for value in graph.outputs:
        match = re.fullmatch(r"present\.(\d+)\.key", str(value.name))
        if match is not None and value.shape is not None and len(value.shape) == 4:
            size = value.shape[2]
            if not isinstance(size, ir.SymbolicDim) or size.value not in (TOTAL, None):
                layers.append(int(match[1]))
    return layers
