"""Detours around attention go, numbers stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from graph_passes.reshapes import RemoveHeadReshapes
from tests.tiny_models import KINDS, export_tiny, prompt_feeds, session


def _chain(split: list[int], second: list[int]) -> ir.Model:
    """x [b, s, 2, 4] -> Reshape [0, 0, 8] -> Reshape -> Transpose -> Transpose."""
    x = ir.Value(name="x", shape=ir.Shape(["b", "s", 2, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    merged = ir.Value(name="merge", const_value=ir.tensor(np.array([0, 0, 8]), name="merge"))
    parts = ir.Value(name="split", const_value=ir.tensor(np.array(split), name="split"))
    for value in (merged, parts):
        assert value.const_value is not None
        value.shape, value.type = ir.Shape(value.const_value.shape), ir.TensorType(ir.DataType.INT64)
    nodes = [ir.node("Reshape", [x, merged])]
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], parts]))
    nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [0, 2, 1, 3]}))
    nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": second}))
    nodes.append(ir.node("Neg", [nodes[-1].outputs[0]]))
    y = nodes[-1].outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=nodes, initializers=[merged, parts], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def _run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    runner = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    return np.asarray(runner.run(None, {"x": x})[0])


@pytest.mark.parametrize(
    ("split", "second", "left"),
    [
        ([0, 0, 2, 4], [0, 2, 1, 3], ["Neg"]),
        ([0, 0, -1, 4], [0, 2, 3, 1], ["Transpose", "Neg"]),
        # Another split is another tensor: it stays.
        ([0, 0, 4, 2], [0, 2, 1, 3], ["Reshape", "Reshape", "Neg"]),
        ([0, -1, 2, 4], [0, 1, 3, 2], ["Reshape", "Reshape", "Transpose", "Neg"]),
    ],
)
def test_chains(split: list[int], second: list[int], left: list[str]) -> None:
    model = _chain(split, second)
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 4)).astype(np.float32)
    before = _run(model, x)
    assert RemoveHeadReshapes()(model).modified
    assert [node.op_type for node in model.graph] == left
    np.testing.assert_array_equal(_run(model, x), before)
    assert not RemoveHeadReshapes()(model).modified


@pytest.mark.parametrize("kind", KINDS)
def test_exports_keep_their_numbers(kind: str) -> None:
    model = export_tiny(kind, "cpu")
    ids = np.random.default_rng(0).integers(3, 256, (2, 20))
    feeds = prompt_feeds(model.graph.inputs, ids)
    wanted = session(model).run(None, feeds)
    nodes = len(model.graph)
    RemoveHeadReshapes()(model)
    assert len(model.graph) < nodes
    for found, expected in zip(session(model).run(None, feeds), wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
