"""Attention as one node computes what it computed in standard operators: prompts, steps, padding, windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.attention.mask import MaskError, window_of
from graph_passes.fuse_attention import GROUP_QUERY, FuseAttention, in_place_node
from graph_passes.naming import name_interface
from graph_passes.reshapes import RemoveHeadReshapes
from tests.tiny_models import SLIDING_WINDOW, export_tiny, next_feeds, prompt_feeds, session

Arrays = dict[str, np.ndarray]
KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3", "opt", "gpt2")
WINDOWS: Mapping[str, list[int | None]] = {"mistral": [SLIDING_WINDOW] * 2, "gemma3_text": [SLIDING_WINDOW, None]}
STEPS = (9, 12, 1, 1, 3, 1)
"""New columns of each run: past the sliding window, with several tokens and one."""


def _graph(kind: str, fusions: str | None = "cpu") -> ir.Model:
    model = export_tiny(kind, fusions)
    name_interface(model)
    RemoveHeadReshapes()(model)
    return model


def _fused(kind: str, fusions: str | None = "cpu") -> tuple[ir.Model, FuseAttention]:
    model, fuse = _graph(kind, fusions), FuseAttention(512)
    fuse(model)
    return model, fuse


def _padded_steps(batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, mask of all columns) of each run; rows are padded on the left, one leaves out a step later on."""
    total = sum(STEPS)
    ids = np.random.default_rng(1).integers(3, 256, (batch, total))
    mask = np.ones((batch, total), np.int64)
    if batch > 1:
        mask[1, :4] = 0
        mask[2, :11] = 0  # nothing of it is in the first run
        mask[0, STEPS[0] + STEPS[1]] = 0
    end = 0
    for width in STEPS:
        end += width
        yield ids[:, end - width : end], mask[:, :end]


def _run(model: ir.Model, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(logits, mask of the new columns) of each run."""
    run = session(model)
    outputs = [str(value.name) for value in model.graph.outputs]
    past: Arrays | None = None
    found = []
    for ids, mask in _padded_steps(batch):
        feeds = prompt_feeds(model.graph.inputs, ids, mask) if past is None else next_feeds(past, ids, mask)
        names = {str(value.name) for value in model.graph.inputs}
        result: dict[str, Any] = dict(
            zip(outputs, run.run(outputs, {key: item for key, item in feeds.items() if key in names}), strict=True)
        )
        past = {name: result[name.replace("past_key_values", "present")] for name in names if "past_key_values" in name}
        found.append((result["logits"], mask[:, -ids.shape[1] :]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_same(kind: str) -> None:
    model, fuse = _fused(kind)
    assert [item.window for item in fuse.report.fused] == WINDOWS.get(kind, [None, None])
    assert fuse.report.kept == []
    assert not any(node.op_type == "Softmax" for node in model.graph)
    for batch in (1, 3):
        for (logits, mask), (wanted, _) in zip(_run(model, batch), _run(_graph(kind), batch), strict=True):
            used = mask == 1
            np.testing.assert_allclose(logits[used], wanted[used], rtol=0, atol=2e-4 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_graphs_without_fusions_are_recognised_too(kind: str) -> None:
    model, fuse = _fused(kind, None)
    assert [item.window for item in fuse.report.fused] == WINDOWS.get(kind, [None, None])
    for (logits, mask), (wanted, _) in zip(_run(model, 3), _run(_graph(kind, None), 3), strict=True):
        used = mask == 1
        np.testing.assert_allclose(logits[used], wanted[used], rtol=0, atol=2e-4 * float(np.abs(wanted).max()))


def test_rotation_and_one_product_for_three_go_into_the_node() -> None:
    model, fuse = _fused("llama")
    assert all(item.rotates and item.is_packed for item in fuse.report.fused)
    assert not any(node.op_type == "RotaryEmbedding" for node in model.graph)
    node = next(node for node in model.graph if node.op_type == GROUP_QUERY)
    assert node.inputs[0] is not None and node.inputs[0].producer() is not None and node.inputs[1:3] == (None, None)
    for kind in ("qwen3", "gemma3_text"):  # with norms of heads between the product and the rotation
        model, norms = _fused(kind)
        assert all(item.rotates and not item.is_packed for item in norms.report.fused)
        assert not any(node.op_type in ("RotaryEmbedding", "Transpose") for node in model.graph)


def test_caches_are_read_by_their_node_alone() -> None:
    model, _ = _fused("gemma3_text")
    pasts = [value for value in model.graph.inputs if "past_key_values" in str(value.name)]
    assert len(pasts) == 4
    assert all((node := in_place_node(value)) is not None and node.op_type == GROUP_QUERY for value in pasts)
    assert all(in_place_node(value) is None for value in _graph("llama").graph.inputs if "past" in str(value.name))


def test_a_second_run_changes_nothing() -> None:
    model, fuse = _fused("llama")
    before = [node.name for node in model.graph]
    assert not fuse(model).modified
    assert [node.name for node in model.graph] == before


def _mask_graph(text: str) -> tuple[ir.Graph, ir.Value]:
    graph = ir.from_onnx_text(text).graph
    return graph, graph.outputs[0]


BIAS = """<ir_version: 10, opset_import: ["": 20]>
g (int64[batch_size, total_sequence_length] attention_mask, int64[batch_size, sequence_length] input_ids)
=> (float[batch_size, 1, sequence_length, total_sequence_length] bias)
<int64[2] axes = {{1, 2}}, int64[1] one = {{1}}, float[1] low = {{{low}}}, float[1] zero = {{0.0}}, int64 start = {{0}},
 int64 step = {{1}}, int64 back = {{{back}}}>
{{
  keep = Cast <to = 9> (attention_mask)
  wide = Unsqueeze (keep, axes)
  total = Shape <start = 1, end = 2> (attention_mask)
  tokens = Shape <start = 1, end = 2> (input_ids)
  past = Sub (total, tokens)
  last = Squeeze (total)
  columns = Range (start, last, step)
  from = Squeeze (past)
  rows = Range (from, last, step)
  upright = Unsqueeze (rows, one)
  shifted = Add (upright, back)
  causal = LessOrEqual (columns, shifted)
  seen = And (wide, causal)
  bias = Where (seen, zero, low)
}}"""


def test_a_causal_mask_is_known_by_what_it_shows() -> None:
    assert window_of(*_mask_graph(BIAS.format(low="-1e30", back=0))) is None


@pytest.mark.parametrize(("low", "back", "reason"), [("-1e30", 1, "neither causal"), ("-2.0", 0, "other numbers")])
def test_other_masks_are_refused(low: str, back: int, reason: str) -> None:
    with pytest.raises(MaskError, match=reason):
        window_of(*_mask_graph(BIAS.format(low=low, back=back)))


def test_an_attention_with_another_mask_stays_with_its_reason() -> None:
    model = _graph("llama")
    softmax = [node for node in model.graph if node.op_type == "Softmax"][1]
    scores = softmax.inputs[0]
    assert scores is not None and scores.producer() is not None
    add = scores.producer()
    assert add is not None
    extra = ir.val("extra", const_value=ir.Tensor(np.array([0.5], np.float32), name="extra"))
    model.graph.register_initializer(extra)
    twice = ir.node("Add", [add.inputs[1], extra])
    model.graph.insert_before(add, [twice])
    add.replace_input_with(1, twice.outputs[0])
    wanted = _run(model, 3)
    fuse = FuseAttention()
    fuse(model)
    assert len(fuse.report.fused) == 1
    assert "other numbers" in fuse.report.kept[0].reason
    for (logits, mask), (before, _) in zip(_run(model, 3), wanted, strict=True):
        np.testing.assert_allclose(logits[mask == 1], before[mask == 1], rtol=0, atol=2e-4 * float(np.abs(before).max()))
