"""Hold two graphs against each other, node by node."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_QUOTED = "pkg.torch.onnx.fx_node"


def differences(one: ir.Graph, other: ir.Graph) -> list[str]:
    """What differs between two graphs: an empty list if nothing does but the names of values inside, and the order of nodes.

    Compared are operators, attributes, and what reads what; names, types and shapes of inputs and outputs; the bytes of
    initializers and the names of weights; types, shapes and module paths of all values and nodes. A size may be read from
    another input that has it: which one stands for all is up to torch.export.
    """
    return list(_Comparison(one, other).differences())


class _Comparison:
    def __init__(self, one: ir.Graph, other: ir.Graph) -> None:
        self._graphs = one, other
        self._pairs: dict[ir.Value, ir.Value] = {}
        self._taken: set[ir.Value] = set()
        self._symbols: dict[str, str] = {}

    def differences(self) -> Iterator[str]:
        one, other = self._graphs
        yield from self._interface("inputs", one.inputs, other.inputs)
        yield from self._interface("outputs", one.outputs, other.outputs)
        if len(one.initializers) != len(other.initializers):
            yield f"{len(one.initializers)} and {len(other.initializers)} initializers"
        names = [value.name for node in other for value in node.outputs] + [*other.initializers]
        if len(set(names)) != len(names):
            yield "two values of one name"
        mine, theirs = in_order(one), in_order(other)
        if len(mine) != len(one) or len(theirs) != len(other) or len(mine) != len(theirs):
            yield f"{len(one)} nodes, {len(mine)} of them used, and {len(other)}, {len(theirs)} of them used"
            return
        for pair in zip(mine, theirs, strict=True):
            if found := list(self._node(*pair)):
                yield from found
                return

    def _interface(self, what: str, mine: Any, theirs: Any) -> Iterator[str]:
        described = [[(value.name, value.dtype, str(value.shape)) for value in values] for values in (mine, theirs)]
        if described[0] != described[1]:
            yield f"{what}: {described[0]} and {described[1]}"

    def _node(self, one: ir.Node, other: ir.Node) -> Iterator[str]:
        both = f"{one.op_type} {one.name!r} and {other.op_type} {other.name!r}"
        if one.op_identifier() != other.op_identifier():
            yield f"{both} differ"
            return
        if (first := _sizes_read(one)) is not None:
            if first != _sizes_read(other):
                yield f"{both} read {first} and {_sizes_read(other)}"
        else:
            if _attributes(one) != _attributes(other):
                yield f"{both}: attributes {_attributes(one)} and {_attributes(other)}"
            if len(one.inputs) != len(other.inputs) or not all(map(self._same, one.inputs, other.inputs)):
                names = [[value and value.name for value in node.inputs] for node in (one, other)]
                yield f"{both} read {names[0]} and {names[1]}"
        if _metadata(one) != _metadata(other):
            yield f"{both}: metadata {_metadata(one)} and {_metadata(other)}"
        for mine, theirs in zip(one.outputs, other.outputs, strict=True):
            self._pair(mine, theirs)
            if mine.dtype != theirs.dtype or not self._same_shape(mine.shape, theirs.shape):
                yield f"{both} make {mine} and {theirs}"

    def _same(self, one: ir.Value | None, other: ir.Value | None) -> bool:
        if one is None or other is None:
            return one is other
        if one in self._pairs or other in self._taken:
            return self._pairs.get(one) is other
        self._pair(one, other)
        if one.is_graph_input() or other.is_graph_input():
            return one.name == other.name
        mine, theirs = one.const_value, other.const_value
        if mine is None or theirs is None:
            return False
        if "weight" in str(one.name) and one.name != other.name:
            return False
        same_type = (mine.dtype, mine.shape, one.dtype, one.shape) == (theirs.dtype, theirs.shape, other.dtype, other.shape)
        return same_type and mine.tobytes() == theirs.tobytes()

    def _pair(self, one: ir.Value, other: ir.Value) -> None:
        self._pairs[one] = other
        self._taken.add(other)

    def _same_shape(self, one: ir.Shape | None, other: ir.Shape | None) -> bool:
        if one is None or other is None:
            return one is other
        return len(one) == len(other) and all(map(self._same_size, map(_size, one), map(_size, other)))

    def _same_size(self, one: str, other: str) -> bool:
        """Sizes of which nothing is known have other names in the other graph, each of them always the same."""
        if _SYMBOL.sub("?", one) != _SYMBOL.sub("?", other):
            return False
        named = zip(_SYMBOL.findall(one), _SYMBOL.findall(other), strict=True)
        return all(self._symbols.setdefault(mine, theirs) == theirs for mine, theirs in named)


def in_order(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that outputs depend on, each behind those that it reads, in an order that only says what reads what."""
    found: dict[ir.Node, None] = {}
    waiting = [(node, 0) for value in reversed(graph.outputs) if (node := value.producer()) is not None]
    while waiting:
        node, index = waiting.pop()
        if node in found:
            continue
        if index == len(node.inputs):
            found[node] = None
            continue
        waiting.append((node, index + 1))
        value = node.inputs[index]
        if value is not None and (producer := value.producer()) is not None:
            waiting.append((producer, 0))
    return list(found)


def _sizes_read(node: ir.Node) -> list[str] | None:
    """The sizes that a node reads from an input of the graph."""
    value = node.inputs[0] if node.op_type == "Shape" else None
    if value is None or not value.is_graph_input():
        return None
    assert value.shape is not None
    return [_size(size) for size in value.shape[node.attributes.get_int("start", 0) : node.attributes.get_int("end", 99)]]


def _size(size: int | ir.SymbolicDim) -> str:
    return str(size) if isinstance(size, int) else size.value or "-"


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {
        name: (value.value.numpy().tobytes() if value.type == ir.AttributeType.TENSOR else _plain(value.value))
        for name, value in node.attributes.items()
    }


def _plain(value: Any) -> Any:
    """As a file holds it."""
    return float(np.float32(value)) if isinstance(value, float) else tuple(value) if isinstance(value, list) else value


def _metadata(node: ir.Node) -> dict[str, str]:
    """Module paths, without the names that the exporter counts up; the line of the program that a node came from is its own."""
    kept = {key: text for key, text in node.metadata_props.items() if key not in (_QUOTED, "namespace")}
    scopes = re.findall(r"'([^']*)'", kept.pop("pkg.torch.onnx.name_scopes", ""))
    spaces = node.metadata_props.get("namespace", "").split("/")
    return {**kept, "scopes": "/".join(scopes[:-1]), "spaces": "/".join(spaces[:-1])}
