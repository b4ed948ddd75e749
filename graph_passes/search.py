"""Find the feed-forward layers of a graph.

The search walks backwards from every matrix product, because the down projection is the one node that every form of an FFN has
and that keeps its module path through fusions. A hand-written walk is used instead of the onnxscript pattern matcher: the
patterns would multiply (packed or not, with or without biases and Reshapes, each spelling of each activation, commuted), and a
pattern that fails says at which node it stopped, not what is wrong with the layer.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import onnx_ir as ir

from graph_passes.matchers import gated_ffn, plain_ffn
from graph_passes.matchers.candidate import candidate
from graph_passes.matchers.common import FFNMatch, Refusal, describe, module_path
from graph_passes.op import DOMAIN, OP_TYPE
from graph_passes.repack import weight_key

MATCHERS = (gated_ffn.match, plain_ffn.match)
MOE_OPS = ("MoE", "QMoE")
FFN_NAME = "clada.ffn"
"""Metadata key by which a rewritten node keeps the name of its FFN."""


@dataclass(frozen=True)
class FFNMiss:
    """An FFN that was expected, or looks like one, and was not matched."""

    name: str
    reason: str


@dataclass(frozen=True)
class FFNSearch:
    """`matches` in graph order; `misses`: expected ones first."""

    matches: list[FFNMatch] = field(default_factory=list)
    misses: list[FFNMiss] = field(default_factory=list)


def find_ffns(model: ir.Model, expected: Sequence[str] = ()) -> FFNSearch:
    """Find every FFN in the main graph; those in bodies of control flow are misses. Nothing is changed and no weight is loaded.

    Args:
        expected: module paths of down projections that the source model has; each is matched or reported as a miss.

    Returns:
        Matches in graph order, and misses with the most specific reason known.
    """
    found_at: list[tuple[ir.Node, FFNMatch]] = []
    refusals: dict[str, list[Refusal]] = {}
    rows, places = row_symbols(model), _Places(model)
    for node in model.graph.all_nodes():
        if node.op_type in MOE_OPS and node.domain == "com.microsoft":
            name = module_path(node) or node.name or node.op_type
            refusals.setdefault(name, []).append(Refusal(f"MoE: {describe(node)} routes tokens to experts", ffn_like=True))
            continue
        found = candidate(node, rows)
        if found is None:
            continue
        results = [matcher(found) for matcher in MATCHERS]
        matches = [result for result in results if isinstance(result, FFNMatch)]
        if matches and node.graph is not model.graph:
            refusals.setdefault(found.name, []).append(places.in_a_body(node))
        elif matches:
            found_at.append((node, matches[0]))
        else:
            refusals.setdefault(found.name, []).extend(result for result in results if isinstance(result, Refusal))
    search = FFNSearch(_told_apart(found_at))
    done = {match.name for match in search.matches} | rewritten_ffns(model)
    for name in expected:
        if name not in done:
            reasons = refusals.get(name)
            search.misses.append(FFNMiss(name, _most_specific(reasons) if reasons else places.missing(name)))
    for name, reasons in refusals.items():
        if name not in done and name not in expected and any(refusal.ffn_like for refusal in reasons):
            search.misses.append(FFNMiss(name, _most_specific(reasons)))
    return search


def row_symbols(model: ir.Model) -> tuple[str, str] | None:
    """The symbols of `input_ids` [batch, sequence], if the graph has this input and both are symbolic."""
    for value in model.graph.inputs:
        if value.name == "input_ids" and value.shape is not None and len(value.shape) == 2:
            symbols = [size.value for size in value.shape if isinstance(size, ir.SymbolicDim)]
            if len(symbols) == 2 and symbols[0] is not None and symbols[1] is not None:
                return symbols[0], symbols[1]
    return None


def rewritten_ffns(model: ir.Model) -> set[str]:
    """Names of the FFNs that are `com.clada::SparseFFN` nodes already."""
    nodes = (node for node in model.graph if node.domain == DOMAIN and node.op_type == OP_TYPE)
    return {node.metadata_props.get(FFN_NAME, str(node.name)) for node in nodes}


def _told_apart(matches: Sequence[tuple[ir.Node, FFNMatch]]) -> list[FFNMatch]:
    """The same matches, where no two layers with weights of their own share a name; nodes may repeat names, or lack them.

    Args:
        matches: each with its down projection. One whose module is known keeps its name: a module that is called twice gives
            two matches, and the exporter may give each a copy of the weights.
    """
    taken: dict[str, Hashable] = {}
    result = []
    for node, match in matches:
        key = match.name if module_path(node) else weight_key(match)
        name, count = match.name, 1
        while taken.setdefault(name, key) != key:
            count += 1
            name = f"{match.name}.{count}"
        result.append(match if name == match.name else replace(match, name=name))
    return result


class _Places:
    """What is said of layers that are not matched: where nodes lie. Made once a search, when there is something to say."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model

    @cached_property
    def _bodies(self) -> dict[ir.Graph, str]:
        """Which body of which node a graph is."""
        found: dict[ir.Graph, str] = {}
        for outer in self._model.graph.all_nodes():
            for attribute in outer.attributes.values():
                bodies = attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()
                if attribute.type == ir.AttributeType.GRAPH:
                    bodies = (attribute.as_graph(),)
                found.update(dict.fromkeys(bodies, f"the {attribute.name} of {describe(outer)}"))
        return found

    @cached_property
    def _modules(self) -> tuple[dict[str, ir.Node], dict[str, ir.Node]]:
        """By module path: the first node of the module or of one inside it, and the first that routes tokens to experts."""
        first: dict[str, ir.Node] = {}
        routing: dict[str, ir.Node] = {}
        for node in self._model.graph:
            names = (module_path(node) or "").split(".")
            for depth in range(1, len(names) + 1):
                path, inner = ".".join(names[:depth]), names[depth : depth + 1]
                first.setdefault(path, node)
                if node.op_type == "TopK" or inner in (["experts"], ["router"]):
                    routing.setdefault(path, node)
        return first, routing

    def in_a_body(self, node: ir.Node) -> Refusal:
        """Why an FFN in the body of an If, Loop or Scan stays as it is: load and counts are values of the main graph."""
        what = self._bodies.get(node.graph) if isinstance(node.graph, ir.Graph) else None
        if what is None:
            return Refusal("it is not in the main graph", ffn_like=True)
        return Refusal(f"it is in a body of control flow ({what}); export the model without", ffn_like=True)

    def missing(self, name: str) -> str:
        """Why no matrix product of this name is in the graph."""
        parent = name.rpartition(".")[0]
        block = parent.removesuffix(".experts")
        first, routing = self._modules
        routed = routing.get(block) or (first.get(block) if ".experts" in name else None)
        if routed is not None:
            return f"MoE: {block!r} routes tokens to experts ({describe(routed)})"
        if parent in first:
            return f"no matrix product carries this module path, though other nodes of {parent!r} are in the graph"
        return "no node of the graph carries this module path"


def _most_specific(refusals: list[Refusal]) -> str:
    """The reason of the matcher that came furthest: the counts of operands, which every matcher checks first, say least."""
    ranked = sorted(refusals, key=lambda refusal: (refusal.ffn_like, "values meet" not in refusal.reason), reverse=True)
    return ranked[0].reason
