"""What a matcher returns: a match, or the reason why there is none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.matchers.weights import MatrixSource, VectorSource

MOST_RESHAPES = 64
"""In a row. Every projection looks back, and none may look through all of a graph."""


@dataclass(frozen=True)
class Refusal:
    """Why a matcher does not apply. `ffn_like`: the nodes look enough like an FFN for a user to want to know."""

    reason: str
    ffn_like: bool = False


@dataclass(frozen=True)
class FFNMatch:
    """One feed-forward layer found in a graph.

    `name` is the module path of the down projection; a module that is called twice gives two matches of one name. `x` and `y`
    are the values before and after the layer, as the projections see them or, where only a Reshape lies between, as [.., d] of
    rank 3. `nodes` compute y from x and nothing else. `dtype` is the element type of x, of y and of the weights. Weights are
    described, not loaded.
    """

    name: str
    kind: str
    activation: str
    gated: bool
    hidden_size: int
    intermediate_size: int
    has_bias: bool
    dtype: ir.DataType
    x: ir.Value
    y: ir.Value
    nodes: tuple[ir.Node, ...]
    gate: MatrixSource | None
    up: MatrixSource
    down: MatrixSource
    gate_bias: VectorSource | None
    up_bias: VectorSource | None
    down_bias: VectorSource | None


def describe(node: ir.Node | None) -> str:
    """`MatMul 'node_linear'`, or what stands in place of a node."""
    return "a graph input or constant" if node is None else f"{node.op_type} {node.name!r}"


def module_path(node: ir.Node) -> str | None:
    """The path of the module that the node was traced from.

    It is in the exporter's metadata, or in the names that TorchScript's exporter gives ("/model/layers.0/mlp/fc2/MatMul").
    """
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    if len(scopes) >= 2:
        return scopes[-2] or None
    # "path: class/path: class/operator: target"
    parts = [part.split(":")[0].strip() for part in node.metadata_props.get("namespace", "").split("/")]
    if len(parts) >= 2:
        return parts[-2] or None
    scope = str(node.name).split("/") if node.name else []
    return ".".join(scope[1:-1]) or None if len(scope) >= 3 and scope[0] == "" else None


def through_reshapes(value: ir.Value) -> Iterator[tuple[ir.Value, ir.Node | None]]:
    """`value`, then the values before the Reshapes (that keep the last axis) and Identities it comes from.

    Each comes with the node that leads from it to the one before, None for the first.
    """
    yield value, None
    for _ in range(MOST_RESHAPES):
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return
        source = node.inputs[0] if node.inputs else None
        if source is None or not (node.op_type == "Identity" or (node.op_type == "Reshape" and keeps_last_axis(node))):
            return
        value = source
        yield value, node


def keeps_last_axis(reshape: ir.Node) -> bool:
    """Whether a Reshape only regroups rows."""
    before, after = last_dim(reshape.inputs[0]), last_dim(reshape.outputs[0])
    return before is not None and before == after


def last_dim(value: ir.Value | None) -> int | None:
    """The size of the last axis, if it is known."""
    dims = trailing_dims(value, 1)
    return None if dims is None else dims[0]


def trailing_dims(value: ir.Value | None, count: int) -> tuple[int, ...] | None:
    """The sizes of the last `count` axes, if there are as many and all are known."""
    if value is None or value.shape is None or len(value.shape) < count:
        return None
    sizes = [fixed_size(size) for size in list(value.shape)[-count:]]
    known = tuple(size for size in sizes if size is not None)
    return known if len(known) == count else None


def fixed_size(size: int | ir.SymbolicDim) -> int | None:
    """The size as a number; the exporter writes some fixed sizes as symbols ("64")."""
    if isinstance(size, int):
        return size
    return int(size.value) if size.value is not None and size.value.isdecimal() else None


def rank(value: ir.Value) -> int | None:
    """The number of axes, if it is known."""
    return None if value.shape is None else len(value.shape)
