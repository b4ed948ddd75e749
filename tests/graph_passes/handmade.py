"""Small graphs built by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from graph_passes import FFNRewrite, find_ffns, rewrite_ffns
from graph_passes.matchers.common import FFNMatch
from graph_passes.op import SparseFFNAttributes

HIDDEN, WIDTH = 16, 24
FEEDS = {
    "input_ids": np.zeros((2, 3), np.int64),
    "x": np.random.default_rng(1).standard_normal((2, 3, HIDDEN)).astype(np.float32),
}


def run(model: ir.Model, **more: np.ndarray) -> dict[str, np.ndarray]:
    """Check the graph, and run it in `onnx.reference` on fixed random numbers."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    names = {value.name for value in proto.graph.input}
    found = ReferenceEvaluator(proto).run(None, {k: v for k, v in {**FEEDS, **more}.items() if k in names})
    return dict(zip((value.name for value in proto.graph.output), found, strict=True))


def scale_by_norm(w_in: np.ndarray, w_out: np.ndarray) -> dict[str, np.ndarray]:
    """The constants of score `exact`."""
    return {"neuron_scale": np.linalg.norm(w_out, axis=1).astype(np.float32)}


def dense_rewrite() -> FFNRewrite:
    """A rewrite whose threshold drops neurons, unless the load is +inf: then it is the layer as it was."""
    return FFNRewrite(SparseFFNAttributes(score="exact"), np.full(1, 0.15, np.float32), scale_by_norm)


def rewrite_only(model: ir.Model) -> FFNMatch:
    """Rewrite the only layer of a graph, in place; its match."""
    (match,) = find_ffns(model).matches
    rewrite_ffns(model, {match.name: dense_rewrite()})
    return match


def rewritten_alike(before: ir.Model, after: ir.Model) -> FFNMatch:
    """Rewrite the only layer of `after`, which is the same graph as `before`, and hold what both compute together, dense."""
    wanted = run(before)
    match = rewrite_only(after)
    found = run(after, load=np.full((2, 3), np.inf, np.float32))
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)
    return match


class Handmade:
    """Collects nodes of a graph with inputs `input_ids` [b, s] and `x` [b, s, 16]."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.tape = ir.tape.Tape()
        self.inputs = [self.input("input_ids", ["b", "s"], ir.DataType.INT64), self.input("x", ["b", "s", HIDDEN])]
        self.initializers: list[ir.Value] = []

    @property
    def x(self) -> ir.Value:
        return self.inputs[1]

    @staticmethod
    def input(name: str, shape: Sequence[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    def add_input(self, name: str, *shape: int | str) -> ir.Value:
        self.inputs.append(self.input(name, shape))
        return self.inputs[-1]

    def const(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.initializers.append(value)
        return value

    def weight(self, name: str, *shape: int) -> ir.Value:
        return self.const(name, (self.rng.standard_normal(shape) / 4).astype(np.float32))

    def scalar(self, value: float) -> ir.Value:
        return self.const(f"scalar_{len(self.initializers)}", np.array(value, dtype=np.float32))

    def op(self, op_type: str, *inputs: ir.Value, module: str = "", shape: Sequence[int | str] | None = None,
           domain: str = "", **attributes: int | float | str | Sequence[int]) -> ir.Value:  # fmt: skip
        """Add a node. `module`: the path that the exporter's metadata would name; `shape`: of the result."""
        scopes = {"pkg.torch.onnx.name_scopes": str(["", module, "op"])} if module else {}
        value = self.tape.op(op_type, list(inputs), attributes, domain=domain, metadata_props=scopes)
        value.name = f"v{len(self.tape.nodes)}"
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = None if shape is None else ir.Shape(shape)
        return value

    def matmul(self, x: ir.Value, weight: ir.Value, module: str = "") -> ir.Value:
        shape = ["b", "s", int(str(weight.shape[-1]))] if weight.shape is not None else None
        return self.op("MatMul", x, weight, module=module, shape=shape)

    def silu(self, value: ir.Value) -> ir.Value:
        return self.op("Mul", value, self.op("Sigmoid", value))

    def swiglu(self, module: str = "mlp", x: ir.Value | None = None) -> ir.Value:
        """A whole SwiGLU layer on `x`."""
        start = self.x if x is None else x
        gate = self.matmul(start, self.weight(f"{module}.gate", HIDDEN, WIDTH))
        up = self.matmul(start, self.weight(f"{module}.up", HIDDEN, WIDTH))
        hidden = self.op("Mul", self.silu(gate), up)
        return self.matmul(hidden, self.weight(f"{module}.down", WIDTH, HIDDEN), module=f"{module}.down_proj")

    def model(self, *outputs: ir.Value) -> ir.Model:
        graph = ir.Graph(
            self.inputs,
            list(outputs),
            nodes=list(self.tape.nodes),
            initializers=self.initializers,
            opset_imports={"": 20, "com.microsoft": 1},
            name="handmade",
        )
        for index, node in enumerate(graph):
            node.name = f"n{index}"
        return ir.Model(graph, ir_version=10)
