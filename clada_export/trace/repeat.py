"""Repeat the block of layers that a shortened decoder was traced with, until the graph has all layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence

import onnx_ir as ir

from clada_export.trace.blocks import Block, LayerNames
from clada_export.trace.recipes import Recipe, renamed
from clada_export.trace.stack import Stack

Values = Mapping[ir.Value, ir.Value]

_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_QUOTED = "pkg.torch.onnx.fx_node"
"""Metadata: the line of the traced program that a node was made from. A copy was made from none."""
_SIGNATURE = "pkg.torch.export.ExportedProgram.graph_signature"
"""Metadata: the interface of the traced program."""


def repeat(graph: ir.Graph, block: Block, stack: Stack) -> dict[ir.Value, Recipe]:
    """Put the missing layers behind the block, in place, and give the layers behind them their own numbers.

    Args:
        graph: of the shortened decoder, its interface named.

    Returns:
        How initializers are made from weights, of the whole graph; they still have the values of stand-ins.
    """
    names = LayerNames(stack.path)
    constants = _renumber(graph, block, names, stack)
    copies = _Copies(graph, block, names, stack.period)
    values: Values = {value: value for node in block.nodes for value in node.outputs}
    last = block.nodes[-1]
    for number in range(1, stack.repeats + 1):
        nodes, values = copies.make(number, values, constants)
        graph.insert_after(last, nodes)
        last = nodes[-1]
    for node in block.after:
        for index, value in enumerate(node.inputs):
            if value is not None and value in values:
                node.replace_input_with(index, values[value])
    graph.metadata_props.pop(_SIGNATURE, None)
    if not _is_sorted(graph):
        graph.sort()
    return constants


def _renumber(graph: ir.Graph, block: Block, names: LayerNames, stack: Stack) -> dict[ir.Value, Recipe]:
    """Give the layers behind the block the numbers that they have in the whole decoder."""
    start, by = stack.first + 2 * stack.period, stack.repeats * stack.period

    def moved(text: str) -> str:
        return names.shifted(text, by, start)

    values = [*graph.initializers.values(), *graph.inputs, *graph.outputs]
    # The last first, so that no name is another layer's meanwhile.
    for value in sorted(values, key=lambda value: names.layer(str(value.name)) or 0, reverse=True):
        value.name = moved(str(value.name))
        _change(value.metadata_props, moved)
    for node in block.after:
        _change(node.metadata_props, moved)
    return {value: renamed(recipe, moved) for value, recipe in block.constants.items()}


def _change(properties: MutableMapping[str, str], change: Callable[[str], str]) -> None:
    # Stack traces are long, and name no layer.
    properties.update({key: change(text) for key, text in properties.items() if not key.endswith("stack_trace")})


class _Copies:
    """Makes copies of a block, each of which reads the one before.

    Args:
        graph: takes the copies' initializers, inputs and outputs; not their nodes.
    """

    def __init__(self, graph: ir.Graph, block: Block, names: LayerNames, period: int) -> None:
        self._graph = graph
        self._block = block
        self._names = names
        self._period = period
        self._computed = {value: None for node in block.nodes for value in node.outputs}
        # What stands in the place of something else of the block before is a layer's own; the rest is the same for all.
        self._own = {other for one, other in block.like.items() if one is not other}
        elsewhere = [*graph.inputs, *(value for node in graph for value in node.outputs if value not in self._computed)]
        self._symbols = _symbols(self._computed) - _symbols(elsewhere)
        self._inputs = _Places(graph.inputs, self._own)
        self._outputs = _Places(graph.outputs, self._own)

    def make(self, number: int, before: Values, constants: dict[ir.Value, Recipe]) -> tuple[list[ir.Node], Values]:
        """One copy.

        Args:
            number: of the copy, from 1.
            before: the values of the copy before it, by those of the block.
            constants: gets the recipes of its initializers.

        Returns:
            Its nodes, and its values by those of the block.
        """
        values: dict[ir.Value, ir.Value] = {}

        def read(value: ir.Value | None) -> ir.Value | None:
            if value is None or value in values:
                return values[value] if value is not None else None
            like = self._block.like.get(value, value)
            if value.producer() is not None and like is not value:
                # It is of the block before.
                return before[like]
            if value.producer() is not None or value not in self._own:
                return value
            values[value] = self._leaf(value, number, constants)
            return values[value]

        nodes = []
        for node in self._block.nodes:
            copy = self._node(node, [read(value) for value in node.inputs], number)
            values.update(zip(node.outputs, copy.outputs, strict=True))
            nodes.append(copy)
        self._inputs.add(values)
        self._outputs.add(values)
        return nodes, {value: values[value] for value in self._computed}

    def _leaf(self, value: ir.Value, number: int, constants: dict[ir.Value, Recipe]) -> ir.Value:
        """A layer's own input or initializer."""
        made = ir.Value()
        self._describe(made, value, number)
        if value.const_value is not None:
            made.const_value = ir.Tensor(value.const_value.numpy(), name=made.name)
            self._graph.register_initializer(made)
            if value in constants:
                constants[made] = renamed(constants[value], lambda name: self._shifted(name, number))
        return made

    def _node(self, node: ir.Node, inputs: list[ir.Value | None], number: int) -> ir.Node:
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            node.attributes,
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
            name=f"{node.name}.{number}",
            metadata_props={key: text for key, text in node.metadata_props.items() if key != _QUOTED},
        )
        _change(copy.metadata_props, lambda text: self._shifted(text, number))
        for made, value in zip(copy.outputs, node.outputs, strict=True):
            self._describe(made, value, number)
        return copy

    def _describe(self, made: ir.Value, value: ir.Value, number: int) -> None:
        """Name, type and metadata of the copy of a value."""
        shifted = self._shifted(str(value.name), number)
        made.name = shifted if shifted != value.name else f"{value.name}.{number}"
        made.type = value.type
        made.shape = None if value.shape is None else ir.Shape([self._size(size, number) for size in value.shape])
        made.metadata_props.update({key: self._shifted(text, number) for key, text in value.metadata_props.items()})

    def _shifted(self, text: str, number: int) -> str:
        return self._names.shifted(text, number * self._period)

    def _size(self, size: int | ir.SymbolicDim, number: int) -> int | str | None:
        """A size that only the block knows may differ from layer to layer (tokens of an expert), so it has another name."""
        if isinstance(size, int) or size.value is None:
            return size if isinstance(size, int) else None
        return _SYMBOL.sub(lambda match: f"{match[0]}_{number}" if match[0] in self._symbols else match[0], size.value)


class _Places:
    """Where a graph's inputs, or its outputs, are put that belong to copies: behind the block's own, in their order."""

    def __init__(self, values: MutableSequence[ir.Value], own: Iterable[ir.Value]) -> None:
        self._values = values
        mine = set(own)
        self._like = [value for value in values if value in mine]
        self._next = values.index(self._like[-1]) + 1 if self._like else 0

    def add(self, copies: Values) -> None:
        """Put in the copies of the block's own."""
        for value in self._like:
            self._values.insert(self._next, copies[value])
            self._next += 1


def _symbols(values: Iterable[ir.Value]) -> set[str]:
    """Names in the sizes of values."""
    sizes = (size for value in values for size in value.shape or () if not isinstance(size, int))
    return {name for size in sizes for name in _SYMBOL.findall(size.value or "")}


def _is_sorted(graph: ir.Graph) -> bool:
    seen: set[ir.Node] = set()
    for node in graph:
        if any(producer not in seen for producer in node.predecessors()):
            return False
        seen.add(node)
    return True
