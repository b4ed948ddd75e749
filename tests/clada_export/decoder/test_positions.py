"""Models that count positions from another number than 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from benchmarks.tiny_decoders import tiny_decoder
from clada_export import export, load_engine
from clada_export.decoder.positions import sample_tokens
from clada_export.decoder.torch_decoder import TorchDecoder
from graph_passes.positions import ShiftPositions
from tests.tiny_models import KINDS, export_tiny, tiny_model


@pytest.mark.parametrize("kind", KINDS)
def test_most_models_count_from_0(kind: str) -> None:
    assert TorchDecoder(tiny_model(kind)).first_position == 0


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta-xl", "data2vec-text"])
def test_positions_after_that_of_padding(model_type: str) -> None:
    model = tiny_decoder(model_type)
    padding = model.config.pad_token_id  # type: ignore[union-attr]
    assert TorchDecoder(model).first_position == padding + 1  # type: ignore[operator]
    assert padding not in sample_tokens(TorchDecoder(model), 4000)
    assert TorchDecoder(model).padding == "left"


def test_such_a_model_is_exported(tmp_path: Path) -> None:
    model = tiny_decoder("roberta")
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    result = export(tmp_path / "model", tmp_path / "out", sparsity=0.3, calibration_context=32, calibration_cache=None)
    assert result.verification is not None and result.verification.passed
    engine = load_engine(tmp_path / "out")
    rows = [[5, 6, 7, 8, 9], [10, 11]]
    found = engine.logits(rows, load="dense")
    for row, logits in zip(rows, found, strict=True):
        with torch.inference_mode():
            wanted = model(input_ids=torch.tensor([row])).logits[0].numpy()
        np.testing.assert_allclose(logits, wanted, atol=1e-4)
    # The embedding of positions has one for padding, which no text reaches.
    limit = model.config.max_position_embeddings  # type: ignore[union-attr]
    assert engine.max_positions == limit - TorchDecoder(model).first_position  # type: ignore[operator]


def test_the_pass_adds_to_every_user_once() -> None:
    model = export_tiny("gpt2")
    given = next(value for value in model.graph.inputs if value.name == "position_ids")
    users = {node.name for node, _ in given.uses()}
    assert users
    assert not ShiftPositions(0)(model).modified
    assert ShiftPositions(2)(model).modified
    ((add, _),) = given.uses()
    assert add.op_type == "Add" and {node.name for node, _ in add.outputs[0].uses()} == users
    assert add.outputs[0].dtype == given.dtype and add.outputs[0].shape == given.shape


def test_a_graph_without_positions_is_left() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    node = ir.node("Neg", [x])
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="g"), ir_version=10)
    assert not ShiftPositions(2)(model).modified
