"""Products of one x become one, to the bit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from clada_export.native.library import ort_library_path
from graph_passes.fuse_attention import FuseAttention
from graph_passes.merge_products import AddBeforeSplit, MergeProducts
from graph_passes.naming import name_interface
from graph_passes.quant.quantiser import QuantFormat, UniformQuantiser
from graph_passes.quant_matmul import QuantiseProducts
from graph_passes.reshapes import RemoveHeadReshapes
from tests.tiny_models import export_tiny, prompt_feeds, session

IDS = np.random.default_rng(0).integers(3, 256, (2, 7))


def _graph(kind: str, fusions: str | None, bits: int | None = None) -> ir.Model:
    model = export_tiny(kind, fusions)
    name_interface(model)
    if bits is not None:
        QuantiseProducts(UniformQuantiser(QuantFormat(bits)))(model)
    return model


def _logits(model: ir.Model) -> np.ndarray:
    run = session(model, ort_library_path())
    return np.asarray(run.run(["logits"], prompt_feeds(model.graph.inputs, IDS))[0])


def _count(model: ir.Model, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_quantised_products_of_one_x_become_one(kind: str, bits: int) -> None:
    wanted = _logits(_graph(kind, None, bits))
    model = _graph(kind, None, bits)
    before = _count(model, "QuantMatMul")
    assert MergeProducts()(model).modified
    # Queries, keys and values; gate and up.
    assert before - _count(model, "QuantMatMul") == 2 * (2 + 1)
    assert not MergeProducts()(model).modified
    np.testing.assert_array_equal(_logits(model), wanted)


def test_rows_that_do_not_fill_tiles_stay() -> None:
    model = _graph("llama", None, 8)
    for node in model.graph:
        if node.op_type == "QuantMatMul":
            node.attributes["out_features"] = ir.AttrInt64("out_features", node.attributes.get_int("out_features", 0) - 1)
    assert not MergeProducts()(model).modified


def test_biases_of_parts_are_added_at_once() -> None:
    wanted = _logits(_graph("qwen2", "cpu"))
    model = _graph("qwen2", "cpu")
    adds = _count(model, "Add")
    assert AddBeforeSplit()(model).modified
    assert adds - _count(model, "Add") == 2 * (3 - 1)
    assert not AddBeforeSplit()(model).modified
    np.testing.assert_array_equal(_logits(model), wanted)
    RemoveHeadReshapes()(model)
    fuse = FuseAttention(512)
    fuse(model)
    assert all(item.is_packed for item in fuse.report.fused)


def test_graphs_without_biases_stay() -> None:
    assert not AddBeforeSplit()(_graph("llama", "cpu")).modified
