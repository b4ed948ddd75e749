"""What both matchers start from: a matrix product that may be a down projection, and the frame around a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from graph_passes.matchers.common import FFNMatch, Refusal, describe, keeps_last_axis, module_path, rank, through_reshapes
from graph_passes.matchers.elementwise import Elementwise, expression
from graph_passes.matchers.projection import MATMUL_OPS, NoProjection, Projection, match_product, match_projection
from graph_passes.matchers.weights import FLOATS, QUANTISED_OPS, VectorSource, casts_floats, vector_source


@dataclass(frozen=True)
class Candidate:
    """A matrix product, with the elementwise expression of its input."""

    name: str
    node: ir.Node
    product: Projection | str
    hidden: Elementwise
    rows: tuple[str, str] | None
    """The symbols of batch and sequence, if the graph has them."""

    def leaf(self, value: ir.Value) -> Projection | NoProjection:
        """The projection that a leaf of the expression comes from, with the bias its activation adds."""
        found = match_projection(value)
        bias = self.hidden.biases.get(value)
        if bias is None or isinstance(found, NoProjection):
            return found
        if found.bias is not None:
            return NoProjection(f"{value.name!r} has a bias and its activation adds another", linear=True)
        if bias.size != found.weight.shape[1]:
            return NoProjection(f"a bias of {bias.size} values is added to {found.weight.shape[1]} columns", linear=True)
        return replace(found, bias=bias)


def candidate(node: ir.Node, rows: tuple[str, str] | None) -> Candidate | None:
    """The candidate that a node gives, None if it is no matrix product."""
    if (node.op_type not in MATMUL_OPS and node.op_type not in QUANTISED_OPS) or node.op_type == "DequantizeLinear":
        return None
    source = node.inputs[0] if node.inputs else None
    if source is None:
        return None
    if (rounding := source.producer()) is not None and rounding.op_type == "DynamicQuantizeLinear":
        source = rounding.inputs[0]
        assert source is not None
    return Candidate(product_name(node), node, match_product(node), expression(source), rows)


def product_name(node: ir.Node) -> str:
    """The module path; without the exporter's metadata the weight's name, if it ends like a parameter's, or the node's.

    Nodes need no names: then the weight's, whatever it is, has to do.
    """
    path = module_path(node)
    if path is not None:
        return path
    weight = node.inputs[1].name if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if weight and weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    return node.name or weight or "ffn"


def refuse_leaves(found: Candidate, leaves: Sequence[Projection | NoProjection]) -> Refusal | None:
    """A refusal if a leaf is not a projection's result."""
    missing = [leaf for leaf in leaves if isinstance(leaf, NoProjection)]
    if not missing:
        return None
    linear = all(not isinstance(leaf, NoProjection) or leaf.linear for leaf in leaves)
    return Refusal(missing[0].reason, ffn_like=linear and bool(found.hidden.operators != "no operator"))


def assemble(
    found: Candidate, kind: str, activation: str, gate: Projection | None, up: Projection, down: Projection
) -> FFNMatch | Refusal:
    """Check everything that both matchers share, and describe the layer."""
    rounding = next((node for node in found.hidden.nodes if node.op_type == "QuantizeLinear"), None)
    if rounding is not None:
        return Refusal(f"quantised activations: {describe(rounding)} rounds the hidden values", ffn_like=True)
    if "experts" in found.name.split("."):
        return Refusal("MoE: the layer is one expert and sees only the tokens routed to it", ffn_like=True)
    hidden_size, intermediate_size = up.weight.shape
    projections = (up,) if gate is None else (gate, up)
    for projection in projections:
        if projection.weight.shape != up.weight.shape:
            return Refusal(f"gate is {list(projection.weight.shape)} and up is {list(up.weight.shape)}", ffn_like=True)
    if down.weight.shape != (intermediate_size, hidden_size):
        wanted = [intermediate_size, hidden_size]
        return Refusal(f"the down projection is {list(down.weight.shape)}; {wanted} is needed", ffn_like=True)
    # A matrix product has operands and a result of one type: the weights' tells those of x and y too.
    dtype = up.weight.dtype
    for source in (*(projection.weight for projection in projections), down.weight):
        if source.dtype not in FLOATS:
            return Refusal(f"weight {source.value.name!r} is {source.dtype}, not floating point", ffn_like=True)
        if source.dtype != dtype:
            found_types = f"{source.dtype}, and {up.weight.value.name!r} is {dtype}"
            return Refusal(f"weight {source.value.name!r} is {found_types}; one type is needed", ffn_like=True)
    assert dtype is not None
    x = _common_x(projections)
    if isinstance(x, Refusal):
        return x
    wrong_rows = _refuse_rows(x, found.rows)
    if wrong_rows is not None:
        return wrong_rows
    y, tail, down_bias = _result(found.node, down.bias, hidden_size)
    inside = {*found.hidden.nodes, *(node for projection in projections for node in projection.nodes)}
    nodes = dict.fromkeys(node for projection in projections for node in _own_nodes(projection, inside))
    nodes.update(dict.fromkeys((*reversed(found.hidden.nodes), found.node, *tail)))
    outside = _refuse_users(tuple(nodes), y)
    if outside is not None:
        return outside
    biases = (gate.bias if gate else None, up.bias, down_bias)
    return FFNMatch(
        name=found.name,
        kind=kind,
        activation=activation,
        gated=gate is not None,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        has_bias=any(bias is not None for bias in biases),
        dtype=dtype,
        x=x,
        y=y,
        nodes=tuple(nodes),
        gate=gate.weight if gate else None,
        up=up.weight,
        down=down.weight,
        gate_bias=biases[0],
        up_bias=biases[1],
        down_bias=biases[2],
    )


def _common_x(projections: Sequence[Projection]) -> ir.Value | Refusal:
    """The value that all projections start from: the nearest of rank 3 behind Reshapes, or the projections' input itself."""
    starts = []
    for projection in projections:
        chain = [value for value, _ in through_reshapes(projection.x)]
        starts.append(next((value for value in chain if rank(value) == 3), chain[0]))
    if any(_same_cast(start) != _same_cast(starts[0]) for start in starts):
        names = " and ".join(repr(start.name) for start in starts)
        return Refusal(f"gate and up start from different values: {names}", ffn_like=True)
    return starts[0]


def _same_cast(value: ir.Value) -> tuple[ir.Value, ir.DataType | None]:
    """What a value is cast from and its type, or the value itself: mixed-precision tools give each reader a Cast of its own."""
    node = value.producer()
    if node is not None and casts_floats(node) and node.inputs[0] is not None:
        return node.inputs[0], ir.DataType(node.attributes.get_int("to", ir.DataType.FLOAT))
    return value, None


def _refuse_rows(x: ir.Value, rows: tuple[str, str] | None) -> Refusal | None:
    """A refusal if the rows of x are known not to be all rows of the batch."""
    if x.shape is None or rows is None:
        return None
    dims = [size if isinstance(size, int) else size.value for size in x.shape]
    if len(dims) not in (2, 3):
        return Refusal(f"x {x.name!r} has {len(dims)} axes; 2 or 3 are supported", ffn_like=True)
    found = dims[-2]
    if found is None:
        return None
    complete = found == rows[1] if len(dims) == 3 else all(symbol in str(found) for symbol in rows)
    if complete:
        return None
    return Refusal(f"x {x.name!r} has rows {dims[:-1]}, not the graph's batch and sequence {list(rows)}", ffn_like=True)


def _result(node: ir.Node, bias: VectorSource | None, width: int) -> tuple[ir.Value, list[ir.Node], VectorSource | None]:
    """Follow the down projection forward over its bias Add and the Reshape back to rank 3: (y, nodes passed, bias)."""
    value, passed = node.outputs[0], []
    reshaped = False
    while len(value.uses()) == 1 and not value.is_graph_output():
        ((user, index),) = value.uses()
        if user.op_type == "Add" and bias is None:
            found = vector_source(user.inputs[1 - index])
            if found is None or found.size != width:
                break
            bias = found
        elif user.op_type == "Reshape" and index == 0 and not reshaped and _back_to_rank_3(user):
            reshaped = True
        else:
            break
        passed.append(user)
        value = user.outputs[0]
    return value, passed, bias


def _back_to_rank_3(reshape: ir.Node) -> bool:
    source = reshape.inputs[0]
    return source is not None and rank(source) != 3 and rank(reshape.outputs[0]) == 3 and keeps_last_axis(reshape)


def _own_nodes(projection: Projection, inside: set[ir.Node]) -> tuple[ir.Node, ...]:
    """The nodes that compute this projection alone: not those up to a Split that also serves others than the layer.

    What is packed with attention stays, and `graph_passes.dead_columns` takes the layer's columns out of it later.
    """
    for index, node in enumerate(projection.nodes):
        if node.op_type == "Split":
            others = (value.is_graph_output() or any(user not in inside for user, _ in value.uses()) for value in node.outputs)
            if any(others):
                return projection.nodes[index + 1 :]
    return projection.nodes


def _refuse_users(nodes: tuple[ir.Node, ...], y: ir.Value) -> Refusal | None:
    """A refusal if a value inside the layer is used outside."""
    inside = set(nodes)
    for node in nodes:
        for value in node.outputs:
            if value is y:
                continue
            if value.is_graph_output():
                return Refusal(f"{value.name!r}, inside the layer, is an output of the graph", ffn_like=True)
            for user, _ in value.uses():
                if user not in inside:
                    what = "one packed with it" if node.op_type == "Split" else "it"
                    return Refusal(
                        f"{value.name!r} of {describe(node)} has another user: {describe(user)} reads {what}", ffn_like=True
                    )
    return None
