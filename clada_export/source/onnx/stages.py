"""Cut a decoder's graph at its FFNs, so that something else can compute them.

Every value has a stage: inputs and weights have 0, an FFN's result has one more than its input, and any other the highest of
what its node reads. A stage is then a graph of its own, which reads values of earlier stages only. Cutting takes time linear in
the number of nodes and copies no weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from graph_passes.matchers.common import FFNMatch


@dataclass(frozen=True)
class Stage:
    """One part of the graph.

    Attributes:
        nodes, initializers: of this part; an initializer that two parts read is in both.
        inputs: values of the graph's inputs and of earlier stages that it reads.
        outputs: values that later stages, FFNs or the graph's outputs need.
        ffns: indices of the FFNs whose input is known after it and not before.
    """

    nodes: tuple[onnx.NodeProto, ...]
    initializers: tuple[onnx.TensorProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ffns: tuple[int, ...]


def cut(model: ir.Model, proto: onnx.ModelProto, matches: Sequence[FFNMatch]) -> tuple[Stage, ...]:
    """Cut the graph.

    Args:
        model: the graph in which `matches` were found; it is not changed.
        proto: the same graph as a message, in which nodes are told by the names of their results.

    Returns:
        The stages in order; what `matches` compute is in none of them.
    """
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    stage = dict.fromkeys(initializers, 0) | {value.name: 0 for value in proto.graph.input}
    inside = {output.name for match in matches for node in match.nodes for output in node.outputs}
    results = {str(match.y.name): match for match in matches}
    nodes: dict[int, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        if any(name in results for name in node.output):
            match = next(results[name] for name in node.output if name in results)
            stage[str(match.y.name)] = stage[str(match.x.name)] + 1
        elif not any(name in inside for name in node.output):
            level = max((stage[name] for name in _reads(node) if name in stage), default=0)
            stage.update(dict.fromkeys(node.output, level))
            nodes.setdefault(level, []).append(node)
    wanted = {str(match.x.name) for match in matches} | {value.name for value in proto.graph.output}
    wanted_at: dict[str, int] = {}
    for level, members in nodes.items():
        for name in (name for node in members for name in _reads(node) if name in stage):
            wanted_at[name] = max(wanted_at.get(name, 0), level)
    stages = []
    for level in range(max(stage.values(), default=0) + 1):
        members = nodes.get(level, [])
        read = dict.fromkeys(name for node in members for name in _reads(node) if name in stage)
        made = {name for node in members for name in node.output if name}
        stages.append(
            Stage(
                tuple(members),
                tuple(initializers[name] for name in read if name in initializers),
                tuple(name for name in read if name not in initializers and name not in made),
                tuple(sorted(name for name in made if name in wanted or wanted_at.get(name, 0) > level)),
                tuple(index for index, match in enumerate(matches) if stage[str(match.x.name)] == level),
            )
        )
    return tuple(stages)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Every name that a node reads, those from outside that its bodies read included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs) if attribute.type != onnx.AttributeProto.TENSOR else ():
            own = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
            own |= {name for inner in body.node for name in inner.output}
            yield from (name for inner in body.node for name in _reads(inner) if name not in own)
            yield from (value.name for value in body.output if value.name not in own)
