"""Graphs of decoders of any depth, as the exporter would make them, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from clada_export.trace.recipes import StandIn

SIZE = 4
WEIGHTS = ("norm.weight", "up.weight", "down.weight", "last.weight")


@dataclass
class Handmade:
    """A decoder of layers in which everything occurs that a block has to be cut along.

    A layer adds to the residual stream what it makes of it, of the mask, and of its keys, and hands on keys and values. Its
    weights are used as they are, by the next layer, transposed as a constant, and together with another in one. With a period,
    the first layer of each has another activation than the rest.

    Attributes:
        weights: of all layers, by name.
        stand_ins: whether their constants are stand-ins; else they are what the exporter makes of real weights.
        odd: a layer whose constant is another than that of all others.
    """

    depth: int
    period: int = 1
    stand_ins: bool = False
    odd: int | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        for layer in range(self.depth):
            for name in WEIGHTS:
                shape = (SIZE,) if name in ("norm.weight", "last.weight") else (SIZE, SIZE)
                self.weights[f"model.layers.{layer}.{name}"] = torch.randn(shape, generator=random)
        self.weights["model.head.weight"] = torch.randn((SIZE, SIZE), generator=random)

    @property
    def used(self) -> frozenset[str]:
        """The weights that the graph reads."""
        return frozenset(self.weights)

    def graph(self) -> ir.Graph:
        """The graph, its interface named."""
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        x, mask = self._input("input", ["batch", SIZE]), self._input("attention_mask", ["batch", SIZE])
        inputs, outputs = [x, mask], []
        shared = self._op("Not", [mask], "mask")
        past = [
            self._input(f"past_key_values.{layer}.{role}", ["batch", SIZE])
            for layer in range(self.depth)
            for role in ("key", "value")
        ]
        length = self._op("Shape", [past[-1]], "length")
        for layer in range(self.depth):
            inputs += past[2 * layer : 2 * layer + 2]
            x, present = self._layer(x, shared, length, past[2 * layer : 2 * layer + 2], layer)
            outputs += present
        x = self._op("Add", [x, self._weight(f"model.layers.{self.depth - 1}.last.weight")], "final")
        head = self._constant("head", "model.head.weight", np.transpose)
        logits = self._op("MatMul", [x, head], "logits")
        values = self._initializers.values()
        graph = ir.Graph(inputs, [logits, *outputs], nodes=self._nodes, initializers=list(values), opset_imports={"": 18})
        graph.metadata_props["pkg.torch.export.ExportedProgram.graph_signature"] = "of what was traced"
        return graph

    def _layer(
        self, x: ir.Value, mask: ir.Value, length: ir.Value, past: list[ir.Value], layer: int
    ) -> tuple[ir.Value, list[ir.Value]]:
        path = f"model.layers.{layer}"
        if layer:
            # A fused norm adds the bias of the layer before.
            bias = self._weight(f"model.layers.{layer - 1}.last.weight")
            x = self._op("Sum", [x, bias, self._weight(f"{path}.norm.weight")], f"{layer}.in", path)
        factor = 9.0 if layer == self.odd else 2.0
        scaled = self._op("Mul", [x, self._weight(f"{path}.norm.weight")], f"{layer}.scaled", path)
        masked = self._op("Where", [mask, scaled, self._number(f"{layer}.factor", factor)], f"{layer}.masked", path)
        operator = "Relu" if layer % self.period else "Tanh"
        up = self._op(
            "MatMul", [masked, self._constant(f"{layer}.up", f"{path}.up.weight", np.transpose)], f"{layer}.up.out", path
        )
        active = self._op(operator, [up], f"{layer}.active", path, [f"n{layer}", SIZE])
        both = self._packed(f"{layer}.packed", [f"{path}.up.weight", f"{path}.down.weight"])
        down = self._op("MatMul", [active, both], f"{layer}.down.out", path)
        present = [
            self._op("Add", [value, down], f"present.{layer}.{role}", path, ["batch", SIZE])
            for value, role in zip(past, ("key", "value"), strict=True)
        ]
        seen = self._op("Expand", [present[0], length], f"{layer}.seen", path)
        return self._op("Add", [x, seen], f"{layer}.out", path), present

    def _input(self, name: str, shape: list[int | str]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))

    def _op(
        self, operator: str, inputs: list[ir.Value], name: str, path: str | None = None, shape: list[int | str] | None = None
    ) -> ir.Value:
        metadata = {} if path is None else {"pkg.torch.onnx.name_scopes": f"['', 'model', '{path}', '{name}']"}
        node = ir.Node("", operator, inputs, name=f"node_{name}", metadata_props=metadata)
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(shape or ["batch", SIZE])
        self._nodes.append(node)
        return node.outputs[0]

    def _tensor(self, name: str) -> ir.TensorProtocol:
        return (StandIn if self.stand_ins else TorchTensor)(self.weights[name], name)

    def _weight(self, name: str) -> ir.Value:
        return self._initializer(name, self._tensor(name))

    def _constant(self, name: str, weight: str, change: Callable[[np.ndarray], np.ndarray]) -> ir.Value:
        return self._initializer(name, ir.Tensor(change(self._tensor(weight).numpy()), name=name))

    def _packed(self, name: str, weights: list[str]) -> ir.Value:
        packed = np.concatenate([self._tensor(weight).numpy() for weight in weights], axis=1)
        return self._initializer(name, ir.Tensor(np.ascontiguousarray(packed), name=name))

    def _number(self, name: str, value: float) -> ir.Value:
        return self._initializer(name, ir.tensor(np.array([value], np.float32), name=name))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._initializers:
            self._initializers[name] = ir.Value(
                name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy())
            )
        return self._initializers[name]
