"""Graphs of every opset that the exporter writes: layers are found, rewritten, and compute what they did."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny_models
from handmade import dense_rewrite

from graph_passes import rewrite_ffns
from graph_passes.function_body import MIN_OPSET

IDS = np.random.default_rng(0).integers(3, 256, (2, 7))
NEWEST = 24
"""Asked for 25 or 26, the exporter (PyTorch 2.13) writes a graph that says opset 18 and uses later operators."""


@pytest.mark.parametrize(
    ("kind", "opset"),
    [
        ("llama", MIN_OPSET),
        ("gpt2", NEWEST),
        *(pytest.param("llama", opset, marks=pytest.mark.long) for opset in (21, 23, NEWEST)),
        pytest.param("gpt2", MIN_OPSET, marks=pytest.mark.long),
    ],
)
def test_an_opset(kind: str, opset: int) -> None:
    model = tiny_models.export_tiny(kind, opset=opset)
    assert model.graph.opset_imports[""] == opset
    session = tiny_models.session(model)
    feeds = tiny_models.prompt_feeds(model.graph.inputs, IDS)
    wanted = session.run(["logits"], feeds)[0]
    report = rewrite_ffns(model, dict.fromkeys(tiny_models.ffn_names(kind), dense_rewrite()))
    assert len(report.ffns) == 2 and report.misses == []
    (function,) = model.functions.values()
    assert function.opset_imports[""] == opset
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    found = tiny_models.session(model).run(["logits"], {**feeds, "load": np.full(IDS.shape, np.inf, np.float32)})[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
