"""Replace products with constant float32 matrices by `com.clada::QuantMatMul` nodes."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graph_passes.emit import Emitter, attribute_values, initializer
from graph_passes.matchers.common import describe, module_path
from graph_passes.matchers.projection import MATMUL_OPS, Projection, match_product
from graph_passes.matchers.weights import (
    QUANTISED_OPS,
    MatrixSource,
    VectorSource,
    is_constant,
    matrix_source,
    vector_source,
)
from graph_passes.quant.contract import BLOCK, DOMAIN, OP_TYPE, OP_VERSION
from graph_passes.quant.function_body import MIN_OPSET, VARIANT, make_function, variant_name
from graph_passes.quant.layout import pack
from graph_passes.quant.op import ContractError, QuantMatMulAttributes, input_names, weight_shape
from graph_passes.quant.quantiser import QuantFormat, Quantiser
from graph_passes.quant.table import emit_rows, table_name
from graph_passes.repack import free_unused


@dataclass(frozen=True)
class QuantisedProduct:
    """One product: `name` of the module or node, sizes, and the bytes of the matrix before and after; 0 after where it shares
    that of another product, `shares_with`."""

    name: str
    node: str
    in_features: int
    out_features: int
    bits: int
    bytes_before: int
    bytes_after: int
    shares_with: str | None = None


@dataclass(frozen=True)
class KeptProduct:
    """A product that stayed as it was, and why."""

    name: str
    reason: str


@dataclass
class QuantReport:
    """`products` and `kept` in graph order; names that no product has come last in `kept`."""

    products: list[QuantisedProduct] = field(default_factory=list)
    kept: list[KeptProduct] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        return asdict(self)


class QuantiseProducts(ir.passes.InPlacePass):
    """Replace `MatMul(x, W) [+ b]` and Gemm by QuantMatMul where W is a constant float32 matrix, and attach the function(s).

    A Gather of rows of such a matrix (an embedding) decodes the rows that it takes, if the quantiser has a form for its table
    (`graph_passes.quant.table.table_name`); where the head is the same matrix, both read the same records.

    A product stays, with its reason in the report, where K is not a multiple of 32, types are others, or the matrix is not
    constant. The matrices are quantised when they are written, one at a time: the pass itself makes no copy of a weight. A
    number in a matrix that is not finite is found then.

    Args:
        quantiser: says how, and makes the codes. A product is called by its module path or, where it has none, by its node.
        names: the products to replace; all by default.

    Attributes:
        report: of the last run.
    """

    def __init__(self, quantiser: Quantiser, names: Collection[str] | None = None) -> None:
        super().__init__()
        self.quantiser = quantiser
        self.names = None if names is None else frozenset(names)
        self.report = QuantReport()

    def requires(self, model: ir.Model) -> None:
        """The opset has what the function's body needs."""
        if (opset := model.graph.opset_imports.get("")) is None or opset < MIN_OPSET:
            raise ir.passes.PreconditionError(f"the graph has opset {opset}; {OP_TYPE} needs {MIN_OPSET} or later")

    def ensures(self, model: ir.Model) -> None:
        """Every node of the op has its function, and its inputs in number."""
        for node in model.graph:
            if (node.domain, node.op_type) != (DOMAIN, OP_TYPE):
                continue
            if (DOMAIN, OP_TYPE, node.overload) not in model.functions:
                raise ir.passes.PostconditionError(f"node {node.name!r} has no function")
            if len(node.inputs) != len(input_names(QuantMatMulAttributes.from_onnx(attribute_values(node)))):
                raise ir.passes.PostconditionError(f"node {node.name!r} has {len(node.inputs)} inputs")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Look at every product of the main graph."""
        report = self.report = QuantReport()
        writer = _Writer(model, self.quantiser)
        seen = set()
        tables: list[tuple[ir.Node, MatrixSource]] = []
        for node in list(model.graph):
            if (table := _table(node)) is not None:
                tables.append((node, table))
            if node.op_type not in MATMUL_OPS and node.op_type not in QUANTISED_OPS:
                continue
            name = module_path(node) or str(node.name)
            seen.add(name)
            if self.names is not None and name not in self.names:
                continue
            product = match_product(node)
            reason = product if isinstance(product, str) else _unfit(product)
            form = self.quantiser.form(name) if reason is None else None
            if isinstance(product, str) or form is None:
                report.kept.append(KeptProduct(name, reason or "the quantiser leaves it as it is"))
            else:
                report.products.append(writer.replace(name, node, product, form))
        # After the products, whose weights they may share.
        for node, table in tables:
            name = table_name(module_path(node) or str(node.name))
            form = self.quantiser.form(name)
            if form is not None and not form.has_offset and (self.names is None or name in self.names):
                report.products.append(writer.look_up(name, node, table, form))
                seen.add(name)
        for name in sorted((self.names or frozenset()) - seen):
            report.kept.append(KeptProduct(name, "the graph has no product of this name"))
        writer.finish()
        return ir.passes.PassResult(model, bool(report.products))


def _unfit(product: Projection) -> str | None:
    """Why the op can't take a product, or None."""
    (node,) = product.nodes
    rows, columns = product.weight.shape
    if rows % BLOCK or rows == 0:
        return f"the matrix has {rows} rows; wanted a multiple of {BLOCK} ({describe(node)})"
    if columns == 0:
        return f"the matrix has no columns ({describe(node)})"
    for what, dtype in (("x", product.x.dtype), ("the matrix", product.weight.dtype)):
        if dtype != ir.DataType.FLOAT:
            return f"{what} has type {'(unknown)' if dtype is None else dtype.name}; wanted FLOAT ({describe(node)})"
    if node.outputs[0].dtype not in (ir.DataType.FLOAT, None):
        return f"the result has another type than x ({describe(node)})"
    return None


def _table(node: ir.Node) -> MatrixSource | None:
    """The constant float32 matrix that a node looks rows up in, as the product with it would have it."""
    if node.op_type != "Gather" or node.domain not in ("", "ai.onnx") or node.attributes.get_int("axis", 0) != 0:
        return None
    value, ids = node.inputs
    if value is None or ids is None or not is_constant(value) or ids.const_value is not None:
        return None
    source = matrix_source(value, transposed=True)
    if isinstance(source, str) or source.cast is not None or source.shape[0] % BLOCK or source.value.dtype != ir.DataType.FLOAT:
        return None
    return source if ids.dtype == ir.DataType.INT64 else None


class _Writer:
    def __init__(self, model: ir.Model, quantiser: Quantiser) -> None:
        self.model, self.graph, self.quantiser = model, model.graph, quantiser
        self.made: dict[Hashable, tuple[str, ir.Value]] = {}
        self.freed: list[ir.Value] = []
        self.names = {str(node.name) for node in model.graph}

    def replace(self, name: str, node: ir.Node, product: Projection, form: QuantFormat) -> QuantisedProduct:
        rows, columns = product.weight.shape
        bias, last = product.bias, node
        if bias is None and (found := _added(node, columns)) is not None:
            bias, last = found
        attributes = QuantMatMulAttributes(columns, form.bits, form.has_offset, bias is not None)
        node_name = self._unique(name)
        owner, weight = self._weight(name, node_name, product.weight, attributes)
        inputs = [product.x, weight]
        if bias is not None:
            # In float32, whatever it is kept in: it is added to float32 sums.
            inputs.append(initializer(self.graph, f"{node_name}.quant_bias", bias.read().astype(np.float32)))
            self.freed.append(bias.value)
        old = last.outputs[0]
        tape = ir.tape.Tape()
        y = tape.op(
            OP_TYPE,
            inputs,
            dict(attributes.to_onnx()),
            domain=DOMAIN,
            overload=self._function(attributes),
            name=node_name,
            metadata_props={**node.metadata_props, "clada.op_version": str(OP_VERSION)},
        )
        y.name, y.type, y.shape = old.name, ir.TensorType(ir.DataType.FLOAT), old.shape
        self.graph.insert_before(node, tape.nodes)
        old.replace_all_uses_with(y, replace_graph_outputs=True)
        for gone in (last, node) if last is not node else (node,):
            self.graph.remove(gone, safe=True)
        self.freed.append(product.weight.value)
        size = int(np.prod(weight_shape(attributes, rows)))
        before = rows * columns * product.weight.value.dtype.itemsize if product.weight.value.dtype is not None else 0
        return QuantisedProduct(name, node_name, rows, columns, form.bits, int(before), 0 if owner else size, owner)

    def look_up(self, name: str, node: ir.Node, table: MatrixSource, form: QuantFormat) -> QuantisedProduct:
        rows, columns = table.shape
        attributes = QuantMatMulAttributes(columns, form.bits)
        node_name = self._unique(module_path(node) or str(node.name))
        owner, weight = self._weight(name, node_name, table, attributes)
        ids, old = node.inputs[1], node.outputs[0]
        assert ids is not None and table.value.dtype is not None
        emitter = Emitter(node_name)
        found = emit_rows(ids, weight, attributes, rows, node_name, partial(initializer, self.graph), emitter)
        found.name, found.type, found.shape = old.name, ir.TensorType(ir.DataType.FLOAT), old.shape
        self.graph.insert_before(node, emitter.tape.nodes)
        old.replace_all_uses_with(found, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        self.freed.append(table.value)
        size = int(np.prod(weight_shape(attributes, rows)))
        before = rows * columns * table.value.dtype.itemsize
        return QuantisedProduct(name, node_name, rows, columns, form.bits, int(before), 0 if owner else size, owner)

    def finish(self) -> None:
        """Let go of weights that nothing uses any more, and of the nodes that only read them."""
        if not self.freed:
            return
        self.model.graph.opset_imports.setdefault(DOMAIN, OP_VERSION)
        RemoveUnusedNodesPass()(self.model)
        free_unused(self.graph, (value for value in self.freed if str(value.name) in self.graph.initializers))

    def _weight(
        self, name: str, node_name: str, source: MatrixSource, attributes: QuantMatMulAttributes
    ) -> tuple[str | None, ir.Value]:
        """The packed matrix; one that was made before in this form with its owner's name."""
        key = (source, attributes.bits, attributes.has_offset)
        if key in self.made:
            return self.made[key]
        # A value of its own, which keeps the data when the graph lets go of its initializer.
        tensor = source.value.const_value
        held = replace(source, value=ir.Value(name=source.value.name, const_value=tensor))
        quantiser, full = self.quantiser, f"{node_name}.quant_weight"

        def evaluate() -> ir.TensorProtocol:
            weight = held.read().T
            try:
                matrix = quantiser.matrix(name, weight)
            except ContractError as error:
                raise ContractError(f"product {name!r}: {error}") from error
            if (found := matrix.attributes()) != wanted:
                raise ContractError(f"product {name!r}: the quantiser gave {found}; wanted {wanted}")
            return ir.Tensor(pack(matrix), name=full)

        wanted = replace(attributes, has_bias=False)
        shape = weight_shape(attributes, source.shape[0])
        if full in self.graph.initializers:
            raise ContractError(f"{OP_TYPE}: the graph has a constant {full!r} already")
        value = ir.val(full, const_value=ir.LazyTensor(evaluate, dtype=ir.DataType.UINT8, shape=ir.Shape(shape), name=full))
        self.graph.register_initializer(value)
        self.made[key] = (node_name, value)
        return None, value

    def _function(self, attributes: QuantMatMulAttributes) -> str:
        """Attach the function the node needs, once; its overload name, which is empty for the model's first variant."""
        variant, functions = variant_name(attributes), self.model.functions
        for function in functions.values():
            if (function.domain, function.name) == (DOMAIN, OP_TYPE) and function.metadata_props.get(VARIANT) == variant:
                return function.overload
        overload = variant if (DOMAIN, OP_TYPE, "") in functions else ""
        function = make_function(attributes, overload=overload, opset=self.graph.opset_imports[""])
        functions[function.identifier()] = function
        return overload

    def _unique(self, name: str) -> str:
        unique, count = name, 1
        while unique in self.names:
            count += 1
            unique = f"{name}.{count}"
        self.names.add(unique)
        return unique


def _added(node: ir.Node, columns: int) -> tuple[VectorSource, ir.Node] | None:
    """A bias that is added to a product, which nothing else reads, and the node that adds it."""
    product = node.outputs[0]
    uses = list(product.uses())
    if len(uses) != 1 or product.is_graph_output():
        return None
    add, index = uses[0].node, uses[0].idx
    if add.op_type != "Add" or add.domain or len(add.inputs) != 2 or add.graph is not node.graph:
        return None
    bias = vector_source(add.inputs[1 - index])
    # A vector's leading axes of 1 could widen a product of rank 1.
    if bias is None or bias.size != columns or bias.value.shape is None or len(bias.value.shape) != 1:
        return None
    return (bias, add) if bias.value.dtype == ir.DataType.FLOAT else None
