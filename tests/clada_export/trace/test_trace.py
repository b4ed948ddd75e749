"""The trace stage: the interface of the graph, and models that it refuses."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import onnx_ir as ir
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import clada_export.trace.exporter
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UnsupportedModelError
from clada_export.trace.trace import trace
from graph_passes import find_ffns
from tests.tiny_models import tiny_model


def _dims(value: ir.Value) -> list[int | str]:
    return [axis if isinstance(axis, int) else str(axis.value) for axis in value.shape or ()]


@pytest.fixture(scope="module")
def graph() -> ir.Graph:
    return trace(TorchDecoder(tiny_model("llama", 0))).graph.graph


def test_one_graph_with_named_free_axes_and_numbers_elsewhere(graph: ir.Graph) -> None:
    inputs = {str(value.name): _dims(value) for value in graph.inputs}
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    cache = ["batch_size", 2, "past_sequence_length", 16]
    expected = {f"past_key_values.{layer}.{role}": cache for layer in range(2) for role in ("key", "value")}
    assert {name: dims for name, dims in inputs.items() if name.startswith("past")} == expected
    outputs = {str(value.name): _dims(value) for value in graph.outputs}
    assert outputs["logits"] == ["batch_size", "sequence_length", 256]
    assert outputs["present.1.value"] == ["batch_size", 2, "total_sequence_length", 16]
    assert len(inputs) == 3 + 4
    assert len(outputs) == 1 + 4


def test_a_model_in_16_bits_gives_a_graph_in_16_bits() -> None:
    model = tiny_model("gemma3_text").to(torch.bfloat16)
    graph = trace(TorchDecoder(model), fusions=None).graph
    tokens = {"input_ids", "attention_mask", "position_ids"}
    for value in [*graph.graph.inputs, *graph.graph.outputs]:
        assert value.dtype == (ir.DataType.INT64 if value.name in tokens else ir.DataType.BFLOAT16), value.name
    matches = find_ffns(graph).matches
    assert [match.name for match in matches] == [ffn.name for ffn in TorchDecoder(model).require_ffns()]
    assert {(match.kind, match.dtype) for match in matches} == {("geglu_tanh", ir.DataType.BFLOAT16)}


def test_the_early_reject_changes_nothing(graph: ir.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clada_export.trace.exporter, "early_reject", nullcontext)
    without = trace(TorchDecoder(tiny_model("llama", 0))).graph.graph
    assert Counter(node.op_type for node in without) == Counter(node.op_type for node in graph)
    assert [node.op_type for node in without] == [node.op_type for node in graph]


def test_a_state_that_is_no_cache_of_keys_and_values() -> None:
    config = AutoConfig.for_model(
        "mamba",
        hidden_size=32,
        num_hidden_layers=1,
        vocab_size=64,
        state_size=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM: "):
        trace(TorchDecoder(model))
