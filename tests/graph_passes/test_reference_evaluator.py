"""Whole rewritten models in `onnx.reference`, which knows nothing of the op but its function body."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import tiny_models
import torch
from handmade import dense_rewrite
from onnx.reference import ReferenceEvaluator

from graph_passes import rewrite_ffns

IDS = np.random.default_rng(0).integers(3, 256, (2, 7))


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_a_rewritten_model_computes_what_the_eager_model_does(kind: str) -> None:
    model = tiny_models.export_tiny(kind, None)
    rewrite_ffns(model, dict.fromkeys(tiny_models.ffn_names(kind), dense_rewrite()))
    proto = ir.to_proto(model)
    feeds = {**tiny_models.prompt_feeds(model.graph.inputs, IDS), "load": np.full(IDS.shape, np.inf, np.float32)}
    found = ReferenceEvaluator(proto).run(["logits", "active_neurons"], feeds)
    with torch.no_grad():
        wanted = tiny_models.tiny_model(kind)(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(found[0], wanted, atol=2e-5, rtol=1e-4)
    assert (found[1] == 96).all()
