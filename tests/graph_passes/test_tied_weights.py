"""A matrix that is looked up in and, transposed, multiplied by is kept once; the numbers stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import tiny_models

from graph_passes.tied_weights import SMALLEST, ShareTransposed

WORDS, WIDTH = SMALLEST // 32, 32


def looked_up_and_multiplied(head: np.ndarray, table: np.ndarray) -> ir.Model:
    ids = ir.val("ids", ir.DataType.INT64, ir.Shape(["batch", "sequence"]))
    weights = [ir.val(name, const_value=ir.Tensor(array, name=name)) for name, array in (("head", head), ("table", table))]
    tape = ir.tape.Tape()
    x = tape.op("Gather", [weights[1], ids])
    y = tape.op("MatMul", [x, weights[0]], name="lm_head")
    y.name, y.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([ids], [y], nodes=tape.nodes, initializers=weights, opset_imports={"": 18})
    return ir.Model(graph, ir_version=10)


def logits(model: ir.Model) -> np.ndarray:
    ids = np.array([[0, 5, WORDS - 1]])
    result: np.ndarray = tiny_models.session(model).run(["logits"], {"ids": ids})[0]
    return result


def test_it_is_kept_once() -> None:
    table = np.random.default_rng(0).standard_normal((WORDS, WIDTH)).astype(np.float32)
    model = looked_up_and_multiplied(np.ascontiguousarray(table.T), table)
    before = logits(model)
    assert ShareTransposed()(model).modified
    assert set(model.graph.initializers) == {"table"}
    assert [(node.op_type, node.name) for node in model.graph][-1] == ("FusedMatMul", "lm_head")
    np.testing.assert_allclose(logits(model), before, rtol=1e-5, atol=1e-5)
    assert not ShareTransposed()(model).modified


@pytest.mark.parametrize("other", ["one weight", "the shape"])
def test_what_is_no_transpose_stays(other: str) -> None:
    table = np.random.default_rng(0).standard_normal((WORDS, WIDTH)).astype(np.float32)
    head = np.ascontiguousarray(table.T)
    if other == "one weight":
        head[-1, -1] += 1
    else:
        head = head[:, :-1].copy()
    model = looked_up_and_multiplied(head, table)
    assert not ShareTransposed()(model).modified
    assert set(model.graph.initializers) == {"table", "head"}
