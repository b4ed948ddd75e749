"""The interface of decoder graphs, and decoding through it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import tiny_models
import torch
from handmade import Handmade

from graph_passes import FFNRewrite, name_interface, rewrite_ffns
from graph_passes.op import SparseFFNAttributes

SLIDING = ("gemma3_text", "mistral")
STEPS = (20, 1, 1, 3, 15)


def shapes(values: list[ir.Value]) -> dict[str, list[int | str | None]]:
    return {str(value.name): [size if isinstance(size, int) else size.value for size in value.shape or ()] for value in values}


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_names_and_sizes(kind: str) -> None:
    model = tiny_models.export_tiny(kind)
    report = name_interface(model)
    heads = 4 if kind in ("opt", "gpt2") else 2
    inputs, outputs = shapes(list(model.graph.inputs)), shapes(list(model.graph.outputs))
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert outputs["logits"] == ["batch_size", "sequence_length", 256]
    for layer in range(2):
        for part in ("key", "value"):
            assert inputs[f"past_key_values.{layer}.{part}"] == ["batch_size", heads, "past_sequence_length", 16]
            assert outputs[f"present.{layer}.{part}"] == ["batch_size", heads, "total_sequence_length", 16]
    assert len(inputs) == 7 and len(outputs) == 5
    assert report.unresolved == [] and report.truncated_layers == []
    assert bool(report.removed) == (kind in SLIDING)
    left = {str(size) for node in model.graph for value in node.outputs for size in value.shape or ()}
    assert not [symbol for symbol in left if symbol.startswith("s") and symbol[1:].isdecimal()]
    again = name_interface(model)
    assert (again.renamed, again.symbols, again.removed) == ({}, {}, [])


@pytest.mark.parametrize("fusions", [None, "cpu"])
@pytest.mark.parametrize("kind", [*SLIDING, "llama"])
def test_steps_beyond_the_sliding_window_equal_eager(kind: str, fusions: str | None) -> None:
    """The window is 16: the prompt is longer, and later steps have a past beyond it."""
    model = tiny_models.export_tiny(kind, fusions)
    name_interface(model)
    names = tiny_models.ffn_names(kind)
    rewrite_ffns(model, {name: FFNRewrite(SparseFFNAttributes(), np.zeros(1, np.float32)) for name in names})
    ids = np.random.default_rng(0).integers(3, 256, (2, sum(STEPS)))
    with torch.no_grad():
        wanted = tiny_models.tiny_model(kind)(torch.from_numpy(ids)).logits.numpy()
    session = tiny_models.session(model)
    outputs = [value.name for value in session.get_outputs()]
    feeds = tiny_models.prompt_feeds(model.graph.inputs, ids[:, : STEPS[0]])
    found, seen = [], 0
    result: dict[str, np.ndarray] = {}
    for count in STEPS:
        if seen:
            past = {name.replace("present", "past_key_values"): array for name, array in result.items() if "present" in name}
            mask = np.ones((2, seen + count), dtype=np.int64)
            feeds = tiny_models.next_feeds(past, ids[:, seen : seen + count], mask)
        feeds["load"] = np.full((2, count), np.inf, dtype=np.float32)
        result = dict(zip(outputs, session.run(None, feeds), strict=True))
        found.append(result["logits"])
        seen += count
    np.testing.assert_allclose(np.concatenate(found, axis=1), wanted, atol=2e-5, rtol=1e-4)


def test_the_window_matters() -> None:
    """Otherwise the test above would say nothing about it."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 256, (1, 40)))
    with torch.no_grad():
        narrow = tiny_models.tiny_model("mistral")(ids).logits
        wide = tiny_models.tiny_model("mistral", sliding_window=64)(ids).logits
    assert float((narrow - wide).abs().max()) > 1e-3


def _with_scalar(suffix: str) -> tuple[Handmade, ir.Value]:
    g = Handmade()
    g.add_input("input.past_key_values.layers.0.keys", "b", 2, "p", 4)
    g.inputs.append(g.input(f"input.past_key_values.layers.0.{suffix}", [], ir.DataType.INT64))
    return g, g.inputs[-1]


def test_a_count_of_past_tokens_is_read_from_a_past_key() -> None:
    g, count = _with_scalar("cumulative_length")
    total = g.op("Add", count, g.const("one", np.array(1, dtype=np.int64)), shape=[])
    total.type = ir.TensorType(ir.DataType.INT64)
    result = g.op("Neg", total, shape=[])
    result.type = ir.TensorType(ir.DataType.INT64)
    total.name = "output.past_key_values.layers.0.cumulative_length"
    model = g.model(result, total)
    report = name_interface(model)
    assert sorted(report.removed) == [
        "input.past_key_values.layers.0.cumulative_length",
        "output.past_key_values.layers.0.cumulative_length",
    ]
    assert report.unresolved == []
    feeds = {value.name: np.zeros((1, 1), np.int64) for value in model.graph.inputs[:1]}
    feeds |= {"x": np.zeros((1, 1, 16), np.float32), "past_key_values.0.key": np.zeros((1, 2, 5, 4), np.float32)}
    assert tiny_models.session(model).run(None, feeds) == [-6]


def test_other_scalars_that_are_used_are_reported() -> None:
    g, window = _with_scalar("_sliding_window_tensor")
    model = g.model(g.op("Neg", window, shape=[]))
    assert name_interface(model).unresolved == [window.name]


def test_a_layer_that_drops_tokens_is_reported() -> None:
    g = Handmade()
    past = g.add_input("input.past_key_values.layers.3.keys", "b", 2, "p", 4)
    recent = g.op("Identity", past, shape=["b", 2, 15, 4])
    recent.name = "output.past_key_values.layers.3.keys"
    assert name_interface(g.model(recent)).truncated_layers == [3]


def test_a_graph_without_tokens_is_refused() -> None:
    g = Handmade()
    model = g.model(g.op("Neg", g.x))
    model.graph.inputs.pop(0)
    with pytest.raises(ir.passes.PreconditionError, match="input_ids"):
        name_interface(model)
