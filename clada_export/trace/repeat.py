"""Repeat the block of layers that a shortened decoder was traced with, until the graph has all layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence

import onnx_ir as ir

from clada_export.trace.blocks import Block, LayerNames
from clada_export.trace.recipes import Recipe, Weight, renamed, same_recipe, weights_in
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
    constants = Constants(graph, block.constants)
    copies = _Copies(graph, block, names, stack.period, constants)
    _renumber(graph, block, names, stack)
    values: Values = {value: value for node in block.nodes for value in node.outputs}
    last = block.nodes[-1]
    for number in range(1, stack.repeats + 1):
        nodes, values = copies.make(number, values)
        graph.insert_after(last, nodes)
        last = nodes[-1]
    _connect(block, names, stack, values, constants)
    graph.metadata_props.pop(_SIGNATURE, None)
    if not _is_sorted(graph):
        graph.sort()
    return constants.read()


def _renumber(graph: ir.Graph, block: Block, names: LayerNames, stack: Stack) -> None:
    """Give the layers behind the block the numbers that they have in the whole decoder: all but their weights."""
    start, by = stack.first + 2 * stack.period, stack.repeats * stack.period

    def moved(text: str) -> str:
        return names.shifted(text, by, start)

    others = [value for value in graph.initializers.values() if value not in block.constants]
    # The last first, so that no name is another layer's meanwhile.
    values = sorted([*others, *graph.inputs, *graph.outputs], key=lambda value: names.layer(str(value.name)) or 0, reverse=True)
    for value in values:
        value.name = moved(str(value.name))
        _change(value.metadata_props, moved)
    for node in block.after:
        _change(node.metadata_props, moved)


def _connect(block: Block, names: LayerNames, stack: Stack, values: Values, constants: Constants) -> None:
    """Let what comes behind the block read the last copy, and its own weights; some may be those of the layer before."""
    start, by = stack.first + stack.period, stack.repeats * stack.period
    for node in block.after:
        for index, value in enumerate(node.inputs):
            if value is not None and value in values:
                node.replace_input_with(index, values[value])
            elif value is not None and value in block.constants:
                own = constants.like(value, lambda text: names.shifted(text, by, start), f"{value.name}.{stack.repeats + 1}")
                node.replace_input_with(index, own)


def _change(properties: MutableMapping[str, str], change: Callable[[str], str]) -> None:
    # Stack traces are long, and name no layer.
    properties.update({key: change(text) for key, text in properties.items() if not key.endswith("stack_trace")})


class Constants:
    """The initializers of a graph that are made from weights; one for each recipe.

    Args:
        graph: has them.
        recipes: of those that it has at first.
    """

    def __init__(self, graph: ir.Graph, recipes: Mapping[ir.Value, Recipe]) -> None:
        self._graph = graph
        self._recipes = dict(recipes)
        self._of_weights: dict[tuple[str, ...], list[ir.Value]] = {}
        for value, recipe in recipes.items():
            self._of_weights.setdefault(weights_in(recipe), []).append(value)

    def like(self, value: ir.Value, rename: Callable[[str], str], name: str) -> ir.Value:
        """The constant that is made as `value` is, from other weights.

        Args:
            name: of a new one that is not just a weight.
        """
        recipe = renamed(self._recipes[value], rename)
        alike = self._of_weights.setdefault(weights_in(recipe), [])
        found = next((other for other in alike if same_recipe(self._recipes[other], recipe)), None)
        if found is None:
            found = _leaf_like(value, recipe.name if isinstance(recipe, Weight) else name, rename)
            self._graph.register_initializer(found)
            self._recipes[found] = recipe
            alike.append(found)
        return found

    def read(self) -> dict[ir.Value, Recipe]:
        """How those are made that a node reads; the others go."""
        for value in [value for value in self._recipes if not value.uses()]:
            del self._recipes[value], self._graph.initializers[str(value.name)]
        return self._recipes


def _leaf_like(value: ir.Value, name: str, rename: Callable[[str], str]) -> ir.Value:
    """Another input, or another initializer with the same constant."""
    tensor = None if value.const_value is None else ir.Tensor(value.const_value.numpy(), name=name)
    metadata = {key: rename(text) for key, text in value.metadata_props.items()}
    return ir.Value(name=name, type=value.type, shape=value.shape, const_value=tensor, metadata_props=metadata)


class _Copies:
    """Makes copies of a block, each of which reads the one before.

    Args:
        graph: takes the copies' initializers, inputs and outputs; not their nodes.
    """

    def __init__(self, graph: ir.Graph, block: Block, names: LayerNames, period: int, constants: Constants) -> None:
        self._graph = graph
        self._constants = constants
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

    def make(self, number: int, before: Values) -> tuple[list[ir.Node], Values]:
        """One copy.

        Args:
            number: of the copy, from 1.
            before: the values of the copy before it, by those of the block.

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
            values[value] = self._leaf(value, number)
            return values[value]

        nodes = []
        for node in self._block.nodes:
            copy = self._node(node, [read(value) for value in node.inputs], number)
            values.update(zip(node.outputs, copy.outputs, strict=True))
            nodes.append(copy)
        self._inputs.add(values)
        self._outputs.add(values)
        return nodes, {value: values[value] for value in self._computed}

    def _leaf(self, value: ir.Value, number: int) -> ir.Value:
        """A layer's own input or initializer."""
        name = self._renamed(str(value.name), number)
        if value in self._block.constants:
            return self._constants.like(value, lambda text: self._shifted(text, number), name)
        made = _leaf_like(value, name, lambda text: self._shifted(text, number))
        if made.const_value is not None:
            self._graph.register_initializer(made)
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
        made.name = self._renamed(str(value.name), number)
        made.type = value.type
        made.shape = None if value.shape is None else ir.Shape([self._size(size, number) for size in value.shape])
        made.metadata_props.update({key: self._shifted(text, number) for key, text in value.metadata_props.items()})

    def _renamed(self, name: str, number: int) -> str:
        shifted = self._shifted(name, number)
        return shifted if shifted != name else f"{name}.{number}"

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
