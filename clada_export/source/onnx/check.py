"""Whether an ONNX message is a model: looked at before anything is made of it.

The libraries that prepare a graph expect that it is one. Given a cycle, a name that nobody defines or an attribute of another
type, they fail anywhere, or not at all, and the passes after them would take it for a graph. All of this takes time linear in
the file's size.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from clada_export.errors import UsageError
from clada_export.foreign import ONNX, ONNX_NODE, reading
from clada_export.source.onnx.functions import body_graphs, check_functions, domain_of, function_key
from clada_export.source.onnx.tensors import MOST_AXES, TensorCheck, refuse_sparse

OLDEST_IR = 3
OLDEST_OPSET = 18
"""That is compiled (`RewriteFFNs`)."""
LARGEST_SIZE = 2**40
"""Of one axis of a value."""
LONGEST_NAME = 200
"""Of a size, in characters."""
_FORMS = {
    "BiasGelu": 2,
    "DequantizeLinear": 2,
    "DynamicQuantizeMatMul": 3,
    "FastGelu": 1,
    "FusedMatMul": 2,
    "Gelu": 1,
    "MatMulBnb4": 3,
    "MatMulIntegerToFloat": 4,
    "MatMulNBits": 3,
    "QGemm": 6,
    "QuantizeLinear": 2,
    "QuickGelu": 1,
}
"""ONNX Runtime's operators that the passes look at, and how many inputs these surely have."""
_TYPES = {
    "alpha": "FLOAT",
    "approximate": "STRING",
    "axis": "INT",
    "beta": "FLOAT",
    "end": "INT",
    "perm": "INTS",
    "start": "INT",
    "to": "INT",
    "transA": "INT",
    "transB": "INT",
    "transBatchA": "INT",
    "transBatchB": "INT",
}
"""The types of attributes that the passes look at."""


def check_model(model: onnx.ModelProto, path: Path) -> int:
    """Look at everything that a model says.

    Args:
        path: of its file; other files are looked for in its folder.

    Returns:
        How many numbers its tensors hold.

    Raises:
        UsageError: it is no model, or weights are missing, too short, or outside its folder.
        UnsupportedModelError: sparse tensors, or functions that come to very many nodes.
    """
    if not model.graph.node or not model.graph.output:
        raise UsageError(f"{path} is {ONNX.fault}: it has no nodes or no outputs")
    if not OLDEST_IR <= model.ir_version <= onnx.IR_VERSION:
        raise UsageError(f"{path}: its ir_version is {model.ir_version}; from {OLDEST_IR} to {onnx.IR_VERSION} is supported")
    check_functions(model, path)
    return _Check(model, path).run()


class _Check:
    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        self._model = model
        self._path = path
        self._tensors = TensorCheck(path)
        self._functions = {function_key(function) for function in model.functions}
        self._context = onnx.checker.C.CheckerContext()
        self._context.ir_version = model.ir_version
        self._in_function = False

    def run(self) -> int:
        graph = self._model.graph
        self._use(self._imports(self._model.opset_import, "the model"))
        for value in (*graph.input, *graph.output):
            if not value.type.HasField("tensor_type") or not value.type.tensor_type.elem_type:
                raise UsageError(
                    f"{self._path}: {value.name!r} of the graph's inputs and outputs is not said to be a tensor of a type"
                )
        self._graph(graph, "the graph", [])
        self._in_function = True
        for function in self._model.functions:
            where = f"function {function.name!r}"
            self._use(self._imports(function.opset_import, where))
            self._values(function.value_info, where)
            own = self._declare(function.input, (), function.node, where)
            self._nodes(function.node, where, own, [])
            self._results(function.output, own, where)
        return self._tensors.elements

    def _imports(self, imports: Iterable[onnx.OperatorSetIdProto], where: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for entry in imports:
            domain, newest = domain_of(entry.domain), onnx.defs.onnx_opset_version()
            if domain in found or not 1 <= entry.version < 2**31:
                raise UsageError(
                    f"{self._path}: {where} imports domain {entry.domain!r} twice, or version {entry.version} of it"
                )
            if domain == "" and entry.version > newest:
                raise UsageError(f"{self._path}: {where} wants opset {entry.version}; up to {newest} is known")
            found[domain] = entry.version
        if "" not in found and where == "the model":
            raise UsageError(f"{self._path}: {where} imports no opset of the standard operators")
        return found

    def _use(self, imports: Mapping[str, int]) -> None:
        self._opsets = dict(imports)
        self._context.opset_imports = self._opsets

    def _graph(self, graph: onnx.GraphProto, where: str, outer: list[set[str]]) -> set[str]:
        """Check a graph; returns the names of outer graphs that it reads."""
        if graph.sparse_initializer:
            raise refuse_sparse(self._path, repr(graph.sparse_initializer[0].values.name))
        for tensor in graph.initializer:
            if not tensor.name:
                raise UsageError(f"{self._path}: {where} has a weight without a name")
            self._tensors.check(tensor)
        self._values((*graph.input, *graph.output, *graph.value_info), where)
        own = self._declare(
            [value.name for value in graph.input], [tensor.name for tensor in graph.initializer], graph.node, where
        )
        free = self._nodes(graph.node, where, own, outer)
        self._results([value.name for value in graph.output], own, where)
        return free

    def _declare(self, inputs: Sequence[str], weights: Sequence[str], nodes: Sequence[onnx.NodeProto], where: str) -> set[str]:
        """The names that a graph defines, each once; but a weight may be an input's default."""
        own: set[str] = set()
        for names, known in ((inputs, own), (weights, set())):
            for name in names:
                if not name or name in known:
                    raise UsageError(f"{self._path}: {where} has two inputs or weights {name!r}, or one without a name")
                known.add(name)
            own |= known
        for node in nodes:
            for name in node.output:
                if name in own:
                    raise UsageError(f"{self._path}: {where} defines {name!r} twice; once more by {_shown(node)}")
                if name:
                    own.add(name)
        return own

    def _nodes(self, nodes: Sequence[onnx.NodeProto], where: str, own: set[str], outer: list[set[str]]) -> set[str]:
        """Check nodes and in which order they can run; returns the names of outer graphs that they read."""
        made_by = {name: index for index, node in enumerate(nodes) for name in node.output if name}
        free: set[str] = set()
        reads: dict[int, set[int]] = {}
        for index, node in enumerate(nodes):
            self._node(node, where)
            names = {name for name in node.input if name}
            for body in body_graphs(node):
                names |= self._graph(body, f"a body of {_shown(node)}", [*outer, own])
            before = reads[index] = set()
            for name in names:
                if name in made_by:
                    before.add(made_by[name])
                elif name not in own:
                    if not any(name in known for known in outer):
                        raise UsageError(f"{self._path}: {where}: {_shown(node)} reads {name!r}, which nothing defines")
                    free.add(name)
        try:
            graphlib.TopologicalSorter(reads).prepare()
        except graphlib.CycleError as error:
            circle = ", ".join(_shown(nodes[index]) for index in error.args[1][:4])
            raise UsageError(f"{self._path}: {where} has a cycle: nodes need each other's results ({circle})") from error
        return free

    def _node(self, node: onnx.NodeProto, where: str) -> None:
        place = f"{self._path}: {where}: {_shown(node)}"
        domain = domain_of(node.domain)
        if not node.op_type or not node.output:
            raise UsageError(f"{place} has no operator, or no outputs")
        if len({attribute.name for attribute in node.attribute}) < len(node.attribute):
            raise UsageError(f"{place} has two attributes of one name")
        for attribute in node.attribute:
            if attribute.ref_attr_name and not self._in_function:
                raise UsageError(f"{place}: attribute {attribute.name!r} refers to one of a function, and this is in none")
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise refuse_sparse(self._path, f"{attribute.name!r} of {_shown(node)}")
            for tensor in (*([attribute.t] if attribute.HasField("t") else ()), *attribute.tensors):
                self._tensors.check(tensor)
        if function_key(node) in self._functions:
            return
        if domain not in self._opsets:
            raise UsageError(f"{place} is of domain {node.domain!r}, which {where} does not import")
        # Of older graphs nothing is compiled, and inspection says what they hold.
        old = domain == "" and self._opsets[domain] < OLDEST_OPSET
        # ONNX Runtime has operators of its own in the standard domain.
        standard = domain == "" and onnx.defs.has(node.op_type, self._opsets[domain], domain)
        if old or not standard:
            self._form(node, place)
        if node.op_type == "Constant" and len(node.attribute) != 1:
            raise UsageError(f"{place} has {len(node.attribute)} values")
        if node.op_type == "Cast" and any(_no_type(attribute) for attribute in node.attribute):
            raise UsageError(f"{place} casts to a type that there is none of")
        if old or any(body_graphs(node)):
            return  # onnx would look for the names of outer graphs
        with reading(ONNX_NODE, place):
            if standard or domain != "":
                onnx.checker.check_node(node, self._context)
            else:
                for attribute in node.attribute:
                    onnx.checker.check_attribute(attribute, self._context)

    def _form(self, node: onnx.NodeProto, place: str) -> None:
        """Hold operators of other domains to what the passes, which go by names, take for granted."""
        least = _FORMS.get(node.op_type)
        for version in (self._opsets.get("", OLDEST_OPSET), onnx.defs.onnx_opset_version()):
            if least is None and onnx.defs.has(node.op_type, version, ""):
                least = onnx.defs.get_schema(node.op_type, version, "").min_input
        if least is None:
            return
        if len(node.input) < least or not all(node.input[:least]):
            raise UsageError(f"{place} has {len(node.input)} inputs; {least} or more are wanted")
        for attribute in node.attribute:
            wanted = _TYPES.get(attribute.name)
            found = onnx.AttributeProto.AttributeType.Name(attribute.type)
            if wanted is not None and found != wanted:
                raise UsageError(f"{place}: attribute {attribute.name!r} is {found}; {wanted} is wanted")

    def _results(self, names: Sequence[str], own: set[str], where: str) -> None:
        """Check that outputs are computed, here: onnx wants an Identity for a value of an outer graph."""
        if len(set(names)) < len(names):
            raise UsageError(f"{self._path}: {where} has two outputs of one name")
        for name in names:
            if name not in own:
                raise UsageError(f"{self._path}: {where} has the output {name!r}, which nothing in it computes")

    def _values(self, values: Iterable[onnx.ValueInfoProto], where: str) -> None:
        """Check the types and shapes that values are said to have."""
        for value in values:
            kind = value.type
            while kind.WhichOneof("value") in ("sequence_type", "optional_type", "map_type"):
                kind = getattr(
                    getattr(kind, kind.WhichOneof("value")), "value_type" if kind.HasField("map_type") else "elem_type"
                )
            which = kind.WhichOneof("value")
            if which not in ("tensor_type", "sparse_tensor_type"):
                continue
            tensor = getattr(kind, which)
            place = f"{self._path}: {where}: {value.name!r}"
            try:
                ir.DataType(tensor.elem_type)
            except ValueError as error:
                raise UsageError(f"{place} has the type {tensor.elem_type}, and there is none of that number") from error
            if len(tensor.shape.dim) > MOST_AXES:
                raise UsageError(f"{place} has {len(tensor.shape.dim)} axes; at most {MOST_AXES} are supported")
            for size in tensor.shape.dim:
                number = int(size.dim_param[:40]) if size.dim_param.isdecimal() else size.dim_value
                if not 0 <= number <= LARGEST_SIZE or len(size.dim_param) > LONGEST_NAME:
                    raise UsageError(f"{place} has an axis of {size.dim_value or size.dim_param[:40]!r}, which is no size")


def check_inputs(model: ir.Model, path: Path) -> None:
    """Look at what is left of a graph's nodes after inlining: a call may leave out what a node of the function needs.

    Raises:
        UsageError: a node without an input that its operator needs; names it.
    """
    for node in model.graph.all_nodes():
        version = model.opset_imports.get("", 1)
        if domain_of(node.domain) == "" and None in node.inputs and onnx.defs.has(node.op_type, version, ""):
            needed = onnx.defs.get_schema(node.op_type, version, "").inputs[: len(node.inputs)]
            for parameter, value in zip(needed, node.inputs, strict=False):
                if value is None and parameter.option == onnx.defs.OpSchema.FormalParameterOption.Single:
                    raise UsageError(
                        f"{path}: {node.op_type} {node.name or node.outputs[0].name!r} lacks its input {parameter.name!r}"
                    )


def _no_type(attribute: onnx.AttributeProto) -> bool:
    """Whether a Cast's `to` is no element type."""
    if attribute.name != "to" or attribute.ref_attr_name:
        return False
    try:
        return ir.DataType(attribute.i) == ir.DataType.UNDEFINED
    except ValueError:
        return True


def _shown(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name or next(iter(node.output), '')!r}"
