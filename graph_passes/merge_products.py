"""Products of one x become one: queries, keys and values of a layer are three parts of a product, with their biases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graph_passes.emit import attribute_values, initializer, result
from graph_passes.matchers.weights import constant_integers, is_constant, vector_source
from graph_passes.quant.contract import DOMAIN, OP_TYPE, TILE_ROWS
from graph_passes.quant.op import QuantMatMulAttributes


class AddBeforeSplit(ir.passes.InPlacePass):
    """Rewrite `Add(part, bias)` of each part of `Split(MatMul(x, W))` to one `Add` before the `Split`.

    The exporter packs matrices that share their x, and leaves the biases behind the parts. A part without one gets zeros. Same
    numbers, and a second run changes nothing.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Look at every Split of the main graph."""
        modified = False
        for node in list(model.graph):
            if (adds := _biased_parts(node)) is not None:
                _add_before(model.graph, node, adds)
                modified = True
        if modified:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """No such Split is left."""
        left = next((node for node in model.graph if _biased_parts(node) is not None), None)
        if left is not None:
            raise ir.passes.PostconditionError(f"biases are still added behind {left.name!r}")


class MergeProducts(ir.passes.InPlacePass):
    """Make one QuantMatMul, and a Split, of those that have the same x and the same kind of weights.

    Their rows have to fill tiles: then the merged weight is one after the other, put together when it is written. A second run
    changes nothing.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Look at every QuantMatMul of the main graph."""
        groups: dict[tuple[ir.Value, tuple[int, bool, bool]], list[ir.Node]] = {}
        for node in model.graph:
            if (key := _kind(node)) is not None:
                groups.setdefault(key, []).append(node)
        merged = [nodes for nodes in groups.values() if len(nodes) > 1]
        for nodes in merged:
            _merge(model.graph, nodes)
        if merged:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(merged))

    def ensures(self, model: ir.Model) -> None:
        """No two that could be one are left."""
        kinds = [key for node in model.graph if (key := _kind(node)) is not None]
        if len(set(kinds)) != len(kinds):
            raise ir.passes.PostconditionError(f"two {OP_TYPE} nodes of one x are left")


def _biased_parts(split: ir.Node) -> list[ir.Node | None] | None:
    """The Add behind each part, None where there is none; None if the Split is not of the kind."""
    if split.op_type != "Split" or split.domain or len(split.inputs) != 2 or split.inputs[0] is None:
        return None
    source, sizes = split.inputs[0], constant_integers(split.inputs[1])
    product = source.producer()
    if product is None or product.op_type != "MatMul" or product.domain or len(list(source.uses())) != 1:
        return None
    if sizes is None or source.is_graph_output() or source.dtype != ir.DataType.FLOAT or source.shape is None:
        return None
    if split.attributes.get_int("axis", 0) not in (-1, len(source.shape) - 1):
        return None
    adds = [_bias_behind(part, int(size)) for part, size in zip(split.outputs, sizes, strict=True)]
    return adds if any(adds) else None


def _bias_behind(part: ir.Value, size: int) -> ir.Node | None:
    uses = list(part.uses())
    if len(uses) != 1 or part.is_graph_output():
        return None
    node, index = uses[0].node, uses[0].idx
    if node.op_type != "Add" or node.domain or node.outputs[0].is_graph_output():
        return None
    bias = vector_source(node.inputs[1 - index])
    if bias is None or bias.size != size or bias.value.dtype != ir.DataType.FLOAT:
        return None
    return node if bias.value.shape is not None and len(bias.value.shape) == 1 else None


def _add_before(graph: ir.Graph, split: ir.Node, adds: Sequence[ir.Node | None]) -> None:
    source, sizes = split.inputs[0], constant_integers(split.inputs[1])
    assert source is not None and sizes is not None
    biases = []
    for add, size in zip(adds, sizes.tolist(), strict=True):
        found = [vector_source(value) for value in add.inputs] if add is not None else []
        biases.append(next((bias.read() for bias in found if bias is not None), np.zeros(size, np.float32)))
    name = f"{split.name}.bias"
    tape = ir.tape.Tape()
    whole = initializer(graph, name, np.concatenate(biases))
    total = tape.op("Add", [source, whole], name=f"{name}.add", output=result(f"{name}.sum", source.dtype, source.shape))
    graph.insert_before(split, tape.nodes)
    split.replace_input_with(0, total)
    for add, part in zip(adds, split.outputs, strict=True):
        if add is not None:
            add.outputs[0].replace_all_uses_with(part)


def _kind(node: ir.Node) -> tuple[ir.Value, tuple[int, bool, bool]] | None:
    """What has to be the same of nodes that become one; None if the node stays."""
    if (node.domain, node.op_type) != (DOMAIN, OP_TYPE) or node.outputs[0].is_graph_output():
        return None
    x, *weights = node.inputs
    attributes = _attributes(node)
    if x is None or attributes.out_features % TILE_ROWS or not all(is_constant(value) for value in weights):
        return None
    # A matrix that others read would be there twice.
    if weights[0] is None or len(list(weights[0].uses())) != 1:
        return None
    return x, (attributes.bits, attributes.has_offset, attributes.has_bias)


def _attributes(node: ir.Node) -> QuantMatMulAttributes:
    return QuantMatMulAttributes.from_onnx(attribute_values(node))


def _merge(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    first, x = nodes[0], nodes[0].inputs[0]
    assert x is not None
    name = f"{first.name}.merged"
    parts = [_attributes(node) for node in nodes]
    whole = QuantMatMulAttributes(
        sum(part.out_features for part in parts), parts[0].bits, parts[0].has_offset, parts[0].has_bias
    )
    inputs = [
        x,
        *(_joined(graph, [node.inputs[index] for node in nodes], f"{name}.{index}") for index in range(1, len(first.inputs))),
    ]
    dims = first.outputs[0].shape
    shape = None if dims is None else ir.Shape([*list(dims)[:-1], whole.out_features])
    tape = ir.tape.Tape()
    product = tape.op(
        OP_TYPE,
        inputs,
        dict(whole.to_onnx()),
        domain=DOMAIN,
        overload=first.overload,
        name=name,
        output=result(f"{name}.out", ir.DataType.FLOAT, shape),
        metadata_props=dict(first.metadata_props),
    )
    sizes = initializer(graph, f"{name}.sizes", np.array([part.out_features for part in parts], np.int64))
    outputs = tape.op_multi_out("Split", [product, sizes], {"axis": -1}, num_outputs=len(nodes), name=f"{name}.split")
    graph.insert_before(first, tape.nodes)
    for node, output in zip(nodes, outputs, strict=True):
        old = node.outputs[0]
        output.name, output.type, output.shape = f"{old.name}.part", old.type, old.shape
        old.replace_all_uses_with(output)
        gone = [value for value in node.inputs[1:] if value is not None]
        graph.remove(node, safe=True)
        for value in gone:
            if not value.uses() and str(value.name) in graph.initializers:
                del graph.initializers[str(value.name)]


def _joined(graph: ir.Graph, values: Sequence[ir.Value | None], name: str) -> ir.Value:
    """Constants one after the other, put together when they are read."""
    tensors = [value.const_value for value in values if value is not None and value.const_value is not None]
    shape = tensors[0].shape.numpy()
    rows = sum(tensor.shape.numpy()[0] for tensor in tensors)

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.concatenate([tensor.numpy() for tensor in tensors]), name=name)

    joined = ir.LazyTensor(evaluate, dtype=tensors[0].dtype, shape=ir.Shape([rows, *shape[1:]]), name=name)
    value = ir.val(name, const_value=joined)
    graph.register_initializer(value)
    return value
