"""Graphs as TorchScript's exporter writes them (optimum uses it): no metadata, few shapes, sizes computed at run time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clada_export.source.onnx.graph import readable_graph
from graph_passes import find_ffns
from graph_passes.shape_reads import HoistShapeReads

D, F, VOCABULARY = 16, 24, 32


class Packed(nn.Module):
    """gate and up by `chunk` of one projection, as Phi-3 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(D, 2 * F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        result: Tensor = self.down_proj(up * nn.functional.silu(gate))
        return result


class Transposed(nn.Module):
    """GPT-2's Conv1D, which flattens rows and puts them back by the shape of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(F, D), Conv1D(D, F)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c_proj(nn.functional.gelu(self.c_fc(x), approximate="tanh"))
        return result


class Flat(nn.Module):
    """Rows in one axis, as OPT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        y: Tensor = self.fc2(torch.relu(self.fc1(x.reshape(-1, shape[-1]))))
        return y.view(shape)


class Decoder(nn.Module):
    """Embedding, norm, FFN, head."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(VOCABULARY, D), nn.LayerNorm(D)
        self.mlp, self.head = ffn, nn.Linear(D, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        logits: Tensor = self.head(x + self.mlp(self.norm(x)))
        return logits


def _export(ffn: nn.Module, path: Path) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(ffn).eval()
    axes = {0: "batch_size", 1: "sequence_length"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros((2, 3), dtype=torch.int64),),
            str(path),
            dynamo=False,
            opset_version=18,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_axes={"input_ids": axes, "logits": axes},
        )
    return model


@pytest.mark.parametrize(
    ("make", "name", "activation"),
    [
        (Packed, "mlp.down_proj", "silu"),
        (Transposed, "mlp.c_proj", "gelu_tanh"),
        (Flat, "mlp.fc2", "relu"),
    ],
)
def test_layers_are_found_and_called_by_their_modules(
    make: Callable[[], nn.Module], name: str, activation: str, tmp_path: Path
) -> None:
    model = _export(make(), tmp_path / "model.onnx")
    graph = readable_graph(tmp_path / "model.onnx")
    (match,) = find_ffns(graph).matches
    assert (match.name, match.activation, match.hidden_size, match.intermediate_size) == (name, activation, D, F)
    # What made the graph readable has not changed what it computes.
    ir.save(graph, tmp_path / "readable.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "readable.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 1), (3, 5)):
        ids = torch.randint(0, VOCABULARY, shape)
        with torch.no_grad():
            np.testing.assert_allclose(session.run(None, {"input_ids": ids.numpy()})[0], model(ids).numpy(), atol=1e-5)


def _shape_of(make: Callable[[ir.tape.Tape, ir.Value], ir.Value], rank: int = 3) -> tuple[ir.Model, ir.Node]:
    """A graph that ends in the shape of what `make` makes of x [b, s, 4]."""
    tape = ir.tape.Tape()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", "s", 4][-rank:]))
    shape = tape.op("Shape", [make(tape, x)], name="shape")
    read = tape.op("Identity", [shape])
    model = ir.Model(ir.Graph([x], [read], nodes=tape.nodes, opset_imports={"": 20}, name="g"), ir_version=10)
    return model, tape.nodes[-2]


def _constant(tape: ir.tape.Tape, *values: float, shape: tuple[int, ...] | None = None) -> ir.Value:
    array = np.array(values, dtype=np.float32).reshape(shape if shape is not None else (len(values),))
    return tape.op("Constant", [], {"value": ir.tensor(array)})


def test_a_shape_is_read_where_it_comes_from() -> None:
    def gelu(tape: ir.tape.Tape, x: ir.Value) -> ir.Value:
        inner = tape.op("Tanh", [tape.op("Mul", [x, _constant(tape, 0.8, shape=())])])
        return tape.op("Mul", [x, tape.op("Add", [inner, _constant(tape, 1.0, shape=())])])

    model, shape = _shape_of(gelu)
    assert HoistShapeReads()(model).modified
    assert shape.inputs[0] is model.graph.inputs[0]
    assert not HoistShapeReads()(model).modified


@pytest.mark.parametrize(
    "make",
    [
        # A constant with more axes, or a longer one, changes the shape.
        lambda tape, x: tape.op("Mul", [x, _constant(tape, 2.0, shape=(1, 1, 1, 1))]),
        lambda tape, x: tape.op("Add", [x, _constant(tape, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, shape=(2, 3, 1))]),
        # Operands of different origins may be broadcast.
        lambda tape, x: tape.op("Mul", [x, tape.op("ReduceMean", [x, tape.op("Constant", [], {"value_ints": [-1]})])]),
        # -1 says nothing.
        lambda tape, x: tape.op("Reshape", [x, tape.op("Constant", [], {"value_ints": [-1, 4]})]),
        lambda tape, x: tape.op("Transpose", [x], {"perm": [1, 0, 2]}),
    ],
)
def test_shapes_that_may_differ_stay(make: Callable[[ir.tape.Tape, ir.Value], ir.Value]) -> None:
    model, shape = _shape_of(make)
    before = shape.inputs[0]
    HoistShapeReads()(model)
    assert shape.inputs[0] is before and list(shape.outputs[0].consumers()) == [model.graph.outputs[0].producer()]


def test_the_target_of_a_reshape_is_its_shape() -> None:
    def flattened(tape: ir.tape.Tape, x: ir.Value) -> ir.Value:
        rows = tape.op("Slice", [tape.op("Shape", [x]), *(tape.op("Constant", [], {"value_ints": [n]}) for n in (0, 1))])
        target = tape.op("Concat", [rows, tape.op("Constant", [], {"value_ints": [2]})], {"axis": 0})
        return tape.op("Relu", [tape.op("Reshape", [x, target], name="reshape")])

    model, _ = _shape_of(flattened)
    assert HoistShapeReads()(model).modified
    (reshape,) = (node for node in model.graph if node.name == "reshape")
    assert model.graph.outputs[0].producer().inputs[0] is reshape.inputs[1]  # type: ignore[union-attr]
