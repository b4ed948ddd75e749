"""Where one block of layers ends and the next begins in a traced graph, and whether the second is the first over again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from clada_export.trace.recipes import Recipe, is_lost, recipe_of, renamed, same_recipe, weights_in
from clada_export.trace.stack import Stack, WholeError

SHARED, BEFORE, FIRST, SECOND, AFTER = range(5)
"""Parts of the graph: what depends on no layer, such as the mask; the layers before the blocks; both blocks; what follows."""

_CACHE = re.compile(r"(past_key_values|present)\.(\d+)\.(key|value)")


@dataclass(frozen=True)
class Block:
    """The block of layers that is repeated, in the graph that was traced.

    Attributes:
        nodes: of the second block, in the order of the graph.
        after: those of the layers behind it and of the head.
        like: from what the first block computes and reads to what the second does in its place.
        constants: initializers that were made from weights, of the whole graph.
    """

    nodes: tuple[ir.Node, ...]
    after: tuple[ir.Node, ...]
    like: Mapping[ir.Value, ir.Value]
    constants: Mapping[ir.Value, Recipe]


class LayerNames:
    """Names that carry the number of a layer: of weights, of the cache's inputs and outputs, of modules in metadata.

    Args:
        path: of the module that holds the layers.
    """

    def __init__(self, path: str) -> None:
        under = path.replace(".", "_")
        self._path = re.compile(rf"(?<![\w.])({re.escape(path)}\.|[pb]_{under}_)(\d+)(?=$|[^\w]|_)")

    def layer(self, name: str) -> int | None:
        """The layer that a weight belongs to, or an input or output of the cache."""
        found = _CACHE.fullmatch(name) or self._path.match(name)
        return int(found[2]) if found else None

    def shifted(self, text: str, by: int, start: int = 0) -> str:
        """What is said of the layer that comes `by` layers later; layers before `start` stay."""

        def later(number: str) -> int:
            return int(number) + (by if int(number) >= start else 0)

        if found := _CACHE.fullmatch(text):
            return f"{found[1]}.{later(found[2])}.{found[3]}"
        return self._path.sub(lambda match: f"{match[1]}{later(match[2])}", text)


def find_block(graph: ir.Graph, stack: Stack, used: frozenset[str]) -> Block:
    """Find the block, and hold it against the one before.

    Args:
        graph: of the shortened decoder, its interface named.
        used: names of the weights that the graph read before constants were folded.

    Raises:
        WholeError: the blocks differ, or it is not known how a constant came from weights.
    """
    names = LayerNames(stack.path)
    constants = _constants(graph, used)
    parts = _parts(graph, stack, names, constants)
    first, second, after = (tuple(node for node in graph if parts[node] == part) for part in (FIRST, SECOND, AFTER))
    like = _Comparison(stack.period, names, constants).compare(first, second)
    of_first = {value for node in first for value in node.outputs}
    for value, recipe in constants.items():
        if any(_part(stack, names.layer(name)) == FIRST for name in weights_in(recipe)):
            of_first.add(value)
    for node in after:
        if not of_first.isdisjoint(value for value in node.inputs if value is not None):
            raise WholeError(f"{_named(node)} reads a layer that is further back than the one before")
    return Block(second, after, like, constants)


def _constants(graph: ir.Graph, used: frozenset[str]) -> dict[ir.Value, Recipe]:
    """How initializers came from weights. Each weight that was read has to be in one, or its way was lost."""
    found = {}
    for value in graph.initializers.values():
        if is_lost(value.const_value):
            raise WholeError(f"it is not known how the constant {value.name!r} was made")
        if (recipe := recipe_of(value.const_value)) is not None:
            found[value] = recipe
    seen = {name for recipe in found.values() for name in weights_in(recipe)}
    if seen != used:
        raise WholeError(f"it is not known what became of {min(seen ^ used)}")
    return found


def _parts(graph: ir.Graph, stack: Stack, names: LayerNames, constants: Mapping[ir.Value, Recipe]) -> dict[ir.Node, int]:
    """The part of each node: the last one that it depends on, or if that is none of the layers, the only one that reads it."""
    parts: dict[ir.Node, int] = {}

    def part(value: ir.Value) -> int:
        producer = value.producer()
        if producer is not None:
            return parts[producer]
        of = weights_in(constants[value]) if value in constants else (str(value.name),) if value.is_graph_input() else ()
        return max((_part(stack, names.layer(name)) for name in of), default=SHARED)

    for node in graph:
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()):
            raise WholeError(f"{_named(node)} holds a graph of its own")
        # The length of the past is that of one layer's, whichever it is.
        is_size = node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].is_graph_input()
        parts[node] = SHARED if is_size else max((part(value) for value in node.inputs if value is not None), default=SHARED)
    for node in reversed(list(graph)):
        if parts[node] == SHARED and not any(value.is_graph_output() for value in node.outputs):
            readers = {parts[user] for value in node.outputs for user, _ in value.uses()}
            parts[node] = readers.pop() if len(readers) == 1 else SHARED
    return parts


def _part(stack: Stack, layer: int | None) -> int:
    if layer is None:
        return SHARED
    return BEFORE if layer < stack.first else min(FIRST + (layer - stack.first) // stack.period, AFTER)


class _Comparison:
    """Two blocks, node by node: the same operators on the same values, up to the numbers of their layers."""

    def __init__(self, period: int, names: LayerNames, constants: Mapping[ir.Value, Recipe]) -> None:
        self._period = period
        self._names = names
        self._constants = constants
        self._like: dict[ir.Value, ir.Value] = {}
        self._of_first: set[ir.Value] = set()

    def compare(self, first: tuple[ir.Node, ...], second: tuple[ir.Node, ...]) -> dict[ir.Value, ir.Value]:
        """See `Block.like`."""
        if len(first) != len(second) or not first:
            raise WholeError(f"blocks of alike layers have {len(first)} and {len(second)} nodes")
        self._of_first = {value for node in first for value in node.outputs}
        for one, other in zip(first, second, strict=True):
            if not self._same_node(one, other):
                raise WholeError(f"{_named(one)} and {_named(other)} differ, of layers that are alike")
        return self._like

    def _same_node(self, one: ir.Node, other: ir.Node) -> bool:
        if one.op_identifier() != other.op_identifier() or not _same_attributes(one, other):
            return False
        if len(one.inputs) != len(other.inputs) or len(one.outputs) != len(other.outputs):
            return False
        inputs = zip(one.inputs, other.inputs, strict=True)
        outputs = zip(one.outputs, other.outputs, strict=True)
        return all(self._same_input(*pair) for pair in inputs) and all(self._same_output(*pair) for pair in outputs)

    def _same_output(self, one: ir.Value, other: ir.Value) -> bool:
        self._like[one] = other
        if one.dtype != other.dtype or one.is_graph_output() != other.is_graph_output():
            return False
        return not one.is_graph_output() or self._names.shifted(str(one.name), self._period) == other.name

    def _same_input(self, one: ir.Value | None, other: ir.Value | None) -> bool:
        if one is None or other is None:
            return one is other
        if one not in self._like:
            if one is not other and not self._corresponds(one, other):
                return False
            self._like[one] = other
        return self._like[one] is other

    def _corresponds(self, one: ir.Value, other: ir.Value) -> bool:
        """Whether a value from outside the first block is to it what `other` is to the second."""
        if one.producer() is not None or other.producer() is not None:
            return one.producer() is not None and other in self._of_first
        if one in self._constants and other in self._constants:
            shifted = renamed(self._constants[one], lambda name: self._names.shifted(name, self._period))
            return same_recipe(shifted, self._constants[other])
        if one.is_graph_input() or other.is_graph_input():
            return self._names.shifted(str(one.name), self._period) == other.name
        return one not in self._constants and other not in self._constants and _equal(one.const_value, other.const_value)


def _same_attributes(one: ir.Node, other: ir.Node) -> bool:
    return one.attributes.keys() == other.attributes.keys() and all(
        _same_attribute(attribute, other.attributes[name]) for name, attribute in one.attributes.items()
    )


def _same_attribute(one: ir.Attr, other: ir.Attr) -> bool:
    if one.type != other.type:
        return False
    return _equal(one.value, other.value) if one.type == ir.AttributeType.TENSOR else bool(one.value == other.value)


def _equal(one: ir.TensorProtocol | None, other: ir.TensorProtocol | None) -> bool:
    """Whether two constants hold the same elements."""
    if one is None or other is None:
        return False
    return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one.numpy(), other.numpy())


def _named(node: ir.Node) -> str:
    return f"{node.op_type} {node.name!r}"
