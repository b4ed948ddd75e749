"""The exact scale of attention: the same scores but for the rounding, and no product over the keys."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.attention_scale import ExactAttentionScale

BATCH, HEADS, QUERIES, KEYS = 1, 2, 3, 5


def attention(size: int, dtype: ir.DataType, root: float | None = None, other: float | None = None) -> ir.Model:
    """scores = (q * r) (k * r), r = size ** -0.25 rounded to `dtype`, as the exporter writes it."""
    root = size**-0.25 if root is None else root

    def value(name: str, shape: list[int]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    def constant(name: str, number: float) -> ir.Value:
        tensor = ir.Tensor(np.array(number).astype(dtype.numpy()), name=name)
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([]), const_value=tensor)

    q, k = value("q", [BATCH, HEADS, QUERIES, size]), value("k", [BATCH, HEADS, size, KEYS])
    factors = [constant("r", root)] + ([] if other is None else [constant("other", other)])
    query = ir.node("Mul", [q, factors[0]], name="scale_q")
    keys = ir.node("Mul", [factors[-1], k], name="scale_k")
    scores = ir.node("MatMul", [query.outputs[0], keys.outputs[0]], name="scores")
    scores.outputs[0].name, scores.outputs[0].type = "scores", ir.TensorType(dtype)
    graph = ir.Graph(
        [q, k], scores.outputs, nodes=[query, keys, scores], initializers=factors, opset_imports={"": 20}, name="attention"
    )
    return ir.Model(graph, ir_version=10)


def used_scale(model: ir.Model) -> float:
    return next(
        float(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if name.startswith("attention_scale") and value.const_value is not None
    )


@pytest.mark.parametrize("dtype", [ir.DataType.BFLOAT16, ir.DataType.FLOAT16])
@pytest.mark.parametrize("size", [8, 64, 96, 128, 256])
def test_the_scale_is_exact(size: int, dtype: ir.DataType) -> None:
    model = attention(size, dtype)
    assert ExactAttentionScale([1 / math.sqrt(size), 0.3, 1.0])(model).modified
    assert used_scale(model) == np.float32(1 / math.sqrt(size))
    assert [node.op_type for node in model.graph] == ["Cast", "Mul", "Cast", "MatMul"]
    scores = model.graph.outputs[0].producer()
    assert scores is not None and scores.inputs[1] is model.graph.inputs[1]
    assert not ExactAttentionScale([1 / math.sqrt(size)])(model).modified


def test_numbers_in_onnx_runtime() -> None:
    import onnxruntime as ort

    model = attention(96, ir.DataType.FLOAT16)
    ExactAttentionScale([96**-0.5])(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=shape).astype(np.float16) for shape in ((1, 2, 3, 96), (1, 2, 96, 5)))
    (found,) = session.run(["scores"], {"q": q, "k": k})
    wanted = q.astype(np.float64) @ k.astype(np.float64) / math.sqrt(96)
    np.testing.assert_allclose(found, wanted, atol=4e-3)


def test_a_scale_that_nobody_names_stays_what_it_was() -> None:
    model = attention(64, ir.DataType.BFLOAT16, root=0.3)
    assert ExactAttentionScale([])(model).modified
    stored = float(np.array(0.3).astype(ir.DataType.BFLOAT16.numpy()))
    assert used_scale(model) == np.float32(stored * stored)


def test_what_is_left_alone() -> None:
    assert not ExactAttentionScale([0.125])(attention(64, ir.DataType.FLOAT)).modified
    assert not ExactAttentionScale([0.125])(attention(64, ir.DataType.FLOAT16, other=0.5)).modified
