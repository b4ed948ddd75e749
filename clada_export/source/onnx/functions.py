"""What the functions of an ONNX model come to when they are inlined, counted before that is done.

A function that calls another twice is a line; thirty of them in a row are 10^9 nodes.
"""

from __future__ import annotations

import graphlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx

from clada_export.errors import UnsupportedModelError, UsageError

MOST_NODES = 1_000_000
"""Of a graph with everything inlined; a decoder of 126 layers has 20,000."""
MOST_STEPS = 50_000_000
_WIDE = 64
"""Inputs of a node."""
_COUNTED = 10**18
"""Calls; more are not told apart."""

Key = tuple[str, str, str]


def body_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node holds."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those of the graphs that they hold."""
    open_nodes = [iter(nodes)]
    while open_nodes:
        node = next(open_nodes[-1], None)
        if node is None:
            open_nodes.pop()
            continue
        yield node
        open_nodes.extend(iter(graph.node) for graph in body_graphs(node))


def domain_of(name: str) -> str:
    """A domain by its one name: the standard operators' has two."""
    return "" if name == "ai.onnx" else name


def function_key(item: onnx.FunctionProto | onnx.NodeProto) -> Key:
    """What tells functions apart; of a node, what it calls if there is such a function."""
    name = item.name if isinstance(item, onnx.FunctionProto) else item.op_type
    return domain_of(item.domain), name, item.overload


def check_functions(model: onnx.ModelProto, path: Path) -> None:
    """Look at who calls whom.

    Raises:
        UsageError: two functions of one name, one that calls itself, or arguments that it has no use for.
        UnsupportedModelError: the graph would have very many nodes.
    """
    functions: dict[Key, onnx.FunctionProto] = {}
    for function in model.functions:
        if functions.setdefault(function_key(function), function) is not function:
            raise UsageError(f"{path}: there are two functions {function.name!r} of domain {function.domain!r}")
    bodies = {key: list(all_nodes(function.node)) for key, function in functions.items()}
    calls = {key: Counter(filter(functions.__contains__, map(function_key, nodes))) for key, nodes in bodies.items()}
    try:
        order = list(graphlib.TopologicalSorter(calls).static_order())
    except graphlib.CycleError as error:
        names = ", which calls ".join(repr(key[1]) for key in error.args[1][:4])
        raise UsageError(f"{path}: a function calls itself: {names}") from error
    main = list(all_nodes(model.graph.node))
    uses = {key: _used_attributes(nodes) for key, nodes in bodies.items()}
    for caller, nodes in (("the graph", main), *((repr(key[1]), nodes) for key, nodes in bodies.items())):
        for node in nodes:
            if (called := functions.get(key := function_key(node))) is not None:
                _check_call(path, caller, node, called, uses[key])
    times: Counter[Key] = Counter(filter(functions.__contains__, map(function_key, main)))
    for key in reversed(order):  # callers first
        # The inliner looks at functions that nobody calls too.
        times[key] = times[key] or 1
        for name, count in calls[key].items():
            times[name] = min(times[name] + times[key] * count, _COUNTED)
    _check_size(path, [("the graph", 1, main), *((f"function {key[1]!r}", times[key], bodies[key]) for key in order)])


def _check_size(path: Path, parts: Sequence[tuple[str, int, Sequence[onnx.NodeProto]]]) -> None:
    """Raise UnsupportedModelError if inlining makes a very large graph, or one that takes very long to prepare.

    Args:
        parts: the graph and the functions, each with how often it is there when all is inlined.
    """

    def most(weight: Callable[[onnx.NodeProto], int]) -> tuple[int, str]:
        counts = [(times * sum(map(weight, nodes)), name, times) for name, times, nodes in parts]
        _, name, times = max(counts)
        return sum(count for count, _, _ in counts), f"{name} alone is there {times:.3g} times"

    nodes, where = most(lambda node: 1)
    if nodes > MOST_NODES:
        raise UnsupportedModelError(
            f"{path}: with its functions inlined, the graph has {nodes:.3g} nodes, and at most {MOST_NODES} are supported; "
            f"{where}"
        )
    # onnx and onnx-ir copy the names of all values for each body, and look through all inputs of a node for each of them.
    bodies, _ = most(lambda node: sum(1 for _ in body_graphs(node)))
    wide, _ = most(lambda node: len(node.input) ** 2 if len(node.input) > _WIDE else 0)
    if bodies * nodes > MOST_STEPS or wide > MOST_STEPS:
        raise UnsupportedModelError(
            f"{path}: {bodies} bodies of control flow in {nodes} nodes, or nodes with very many inputs, take too long to "
            "prepare"
        )


def _used_attributes(nodes: Sequence[onnx.NodeProto]) -> dict[str, int]:
    """The types that a function's nodes use its attributes as."""
    return {item.ref_attr_name: item.type for node in nodes for item in node.attribute if item.ref_attr_name}


def _check_call(path: Path, caller: str, node: onnx.NodeProto, called: onnx.FunctionProto, wanted: Mapping[str, int]) -> None:
    """Raise UsageError unless a call gives the function what it takes."""
    where = f"{path}: {caller} calls the function {called.name!r}"
    if len(node.input) > len(called.input) or len(node.output) > len(called.output):
        raise UsageError(
            f"{where} with {len(node.input)} inputs for {len(node.output)} outputs; it takes {len(called.input)} and gives "
            f"{len(called.output)}"
        )
    for attribute in (*node.attribute, *called.attribute_proto):
        kind = wanted.get(attribute.name, attribute.type)
        if kind != attribute.type:
            names = onnx.AttributeProto.AttributeType.Name
            raise UsageError(
                f"{where} with attribute {attribute.name!r} as {names(attribute.type)}; it is used as {names(kind)}"
            )
