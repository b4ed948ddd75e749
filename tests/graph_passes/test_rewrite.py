"""Rewritten graphs: the same numbers dense, the reference's numbers sparse, and a graph that holds together."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny_models
import torch
from eager import score_constants, sparse_eager
from handmade import HIDDEN, Handmade

from graph_passes import FFNRewrite, find_ffns, rewrite_ffns
from graph_passes.op import DOMAIN, ContractError, SparseFFNAttributes

ACTIVATION_OF = {"gemma": "gelu_tanh", "gemma3_text": "gelu_tanh", "opt": "relu", "gpt2": "gelu_tanh"}
IDS = np.random.default_rng(0).integers(3, 256, (2, 7))
DENSE = np.full(IDS.shape, np.inf, dtype=np.float32)
LOAD = np.random.default_rng(1).normal(size=IDS.shape).astype(np.float32)


def plan(names: list[str], **attributes: object) -> dict[str, FFNRewrite]:
    """Rewrites whose numbers differ from layer to layer."""
    base = SparseFFNAttributes(**{"load_slope": 0.2, "load_min": 0.5, "load_max": 2.0, **attributes})  # type: ignore[arg-type]
    threshold = 40.0 if base.rule == "topk" else 0.15
    return {
        name: FFNRewrite(
            replace(base, load_slope=base.load_slope + 0.1 * index),
            np.array([threshold * (1 + 0.5 * index)], dtype=np.float32),
            score_constants,
        )
        for index, name in enumerate(names)
    }


def run(model: ir.Model, load: np.ndarray | None = None, **extra: np.ndarray) -> dict[str, np.ndarray]:
    session = tiny_models.session(model)
    feeds = {**tiny_models.prompt_feeds(model.graph.inputs, IDS), **extra}
    if load is not None:
        feeds["load"] = load
    return dict(zip((value.name for value in session.get_outputs()), session.run(None, feeds), strict=True))


def checker_complaint(model: ir.Model) -> str:
    """What the full checker says, with node numbers left out; empty if it is content."""
    try:
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error).split("Context")[0].strip()
    return ""


@pytest.mark.parametrize("fusions", [None, "cpu"])
@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_dense_equals_the_original_and_sparse_the_reference(kind: str, fusions: str | None) -> None:
    model = tiny_models.export_tiny(kind, fusions)
    complaint = checker_complaint(model)
    assert fusions or not complaint
    wanted = run(model)
    rewrites = plan(tiny_models.ffn_names(kind), score="exact")
    report = rewrite_ffns(model, rewrites)
    assert [ffn.name for ffn in report.ffns] == list(rewrites) and report.misses == []
    # ONNX Runtime's fusions put its own operators in the standard domain, which the checker refuses before and after.
    assert checker_complaint(model) == complaint

    dense = run(model, DENSE)
    for name, array in wanted.items():
        np.testing.assert_allclose(dense[name], array, atol=1e-5, rtol=1e-5)
    assert dense["active_neurons"].shape == (2, 2, 7) and (dense["active_neurons"] == 96).all()

    sparse = run(model, LOAD)
    eager = sparse_eager(kind, tiny_models.tiny_model(kind), rewrites, ACTIVATION_OF.get(kind, "silu"), LOAD)
    with torch.no_grad():
        logits = eager(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(sparse["logits"], logits, atol=2e-5, rtol=1e-4)
    assert np.abs(sparse["logits"] - wanted["logits"]).max() > 1e-2
    assert 5 < sparse["active_neurons"].mean() < 91


@pytest.mark.parametrize("rule", ["threshold", "relative", "topk"])
@pytest.mark.parametrize("score", ["gate", "exact", "shadow"])
def test_scores_and_rules_in_a_whole_model(score: str, rule: str) -> None:
    model = tiny_models.export_tiny("llama")
    rewrites = plan(tiny_models.ffn_names("llama"), score=score, rule=rule, granule=2)
    rewrite_ffns(model, rewrites)
    eager = sparse_eager("llama", tiny_models.tiny_model("llama"), rewrites, "silu", LOAD)
    with torch.no_grad():
        logits = eager(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(run(model, LOAD)["logits"], logits, atol=2e-5, rtol=1e-4)


def test_the_interface() -> None:
    model = tiny_models.export_tiny("llama")
    rewrite_ffns(model, plan(tiny_models.ffn_names("llama")))
    inputs = {value.name: value for value in model.graph.inputs}
    assert inputs["load"].shape == inputs["input_ids"].shape and inputs["load"].dtype == ir.DataType.FLOAT
    counts = model.graph.outputs[-1]
    assert counts.name == "active_neurons" and counts.dtype == ir.DataType.INT32
    assert [str(size) for size in counts.shape or ()] == ["s44", "2", "s70"]
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    assert [node.name for node in nodes] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    first = nodes[0]
    assert first.attributes.get_string("plugin_namespace") == "com.clada"
    assert first.attributes.get_string("plugin_version") == "1"
    assert [value.name for value in first.inputs if value is not None][2:] == [
        "model.layers.0.mlp.w_in", "model.layers.0.mlp.w_out", "model.layers.0.mlp.threshold",
    ]  # fmt: skip
    assert first.doc_string and first.metadata_props["clada.op_version"] == "1"
    assert [str(size) for size in first.outputs[0].shape or ()] == ["s44", "s70", "64"]
    assert model.graph.opset_imports[DOMAIN] == 1 and len(model.functions) == 1


def test_a_second_run_changes_nothing() -> None:
    model = tiny_models.export_tiny("gpt2")
    rewrites = plan(tiny_models.ffn_names("gpt2"))
    rewrite_ffns(model, rewrites)
    before = ir.to_proto(model).SerializeToString()
    report = rewrite_ffns(model, rewrites)
    assert (report.ffns, report.misses, report.nodes_before) == ([], [], report.nodes_after)
    assert ir.to_proto(model).SerializeToString() == before


def test_layers_not_named_stay_dense_and_names_not_found_are_misses() -> None:
    model = tiny_models.export_tiny("llama")
    wanted = run(model)["logits"]
    first, second = tiny_models.ffn_names("llama")
    report = rewrite_ffns(model, plan([second, "model.layers.9.mlp.down_proj"]))
    assert [ffn.name for ffn in report.ffns] == [second]
    assert [miss.name for miss in report.misses] == ["model.layers.9.mlp.down_proj"]
    assert [match.name for match in find_ffns(model).matches] == [first]
    result = run(model, DENSE)
    np.testing.assert_allclose(result["logits"], wanted, atol=1e-5)
    assert result["active_neurons"].shape == (2, 1, 7)
    assert report.to_dict()["ffns"][0]["kind"] == "swiglu" and report.nodes_after < report.nodes_before


def test_structural_variants_in_one_model() -> None:
    model = tiny_models.export_tiny("llama")
    wanted = run(model)["logits"]
    first, second = tiny_models.ffn_names("llama")
    rewrites = plan([first], score="exact") | plan([second], score="shadow", rule="topk")
    rewrite_ffns(model, rewrites)
    assert len(model.functions) == 2
    assert checker_complaint(model) == ""
    np.testing.assert_allclose(run(model, DENSE)["logits"], wanted, atol=1e-5)
    eager = sparse_eager("llama", tiny_models.tiny_model("llama"), rewrites, "silu", LOAD)
    with torch.no_grad():
        logits = eager(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(run(model, LOAD)["logits"], logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_narrow_weights(dtype: ir.DataType) -> None:
    model = tiny_models.export_tiny("opt")
    wanted = run(model)["logits"]
    report = rewrite_ffns(model, plan(tiny_models.ffn_names("opt")), weight_dtype=dtype, emit_active=False)
    assert report.ffns[0].weight_bytes == 2 * 64 * 96 * 2 + 4 * (64 + 96)
    assert "active_neurons" not in {value.name for value in model.graph.outputs}
    assert model.graph.initializers["model.decoder.layers.0.fc2.w_in"].dtype == dtype
    np.testing.assert_allclose(run(model, DENSE)["logits"], wanted, atol=0.05)


def test_the_prompt_statistic_becomes_state() -> None:
    model = tiny_models.export_tiny("llama")
    wanted = run(model)["logits"]
    rewrite_ffns(model, plan(tiny_models.ffn_names("llama"), score="prefix", use_stat=True, emit_stat=True))
    past = {f"past_stat.{i}": np.zeros((2, 96), dtype=np.float32) for i in range(2)}
    result = run(model, DENSE, **past)
    np.testing.assert_allclose(result["logits"], wanted, atol=1e-5)
    np.testing.assert_allclose(result["present_stat.1"].sum(-1), 7.0, rtol=1e-5)
    past = {f"past_stat.{i}": result[f"present_stat.{i}"] for i in range(2)}
    assert 0 < run(model, LOAD, **past)["active_neurons"].mean() < 96


def test_layers_are_made_when_they_are_written_one_at_a_time(tmp_path: Path) -> None:
    """Nothing is read by the pass; of a layer all is made once, and it is let go before the next is made."""
    model = tiny_models.export_tiny("llama", "cpu")
    made: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def watched(w_in: np.ndarray, w_out: np.ndarray) -> Mapping[str, np.ndarray]:
        gc.collect()
        alive.append(sum(reference() is not None for reference in made))
        made.append(weakref.ref(w_in))
        return score_constants(w_in, w_out)

    rewrites = plan(tiny_models.ffn_names("llama"), score="exact")
    rewrite_ffns(model, {name: replace(rewrite, make_constants=watched) for name, rewrite in rewrites.items()})
    assert not made
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    assert alive == [0, 0]


def test_shared_weights_are_packed_once() -> None:
    g = Handmade()
    gate, up, down = g.weight("g", HIDDEN, 24), g.weight("u", HIDDEN, 24), g.weight("d", 24, HIDDEN)
    x = g.x
    for _ in range(2):
        hidden = g.op("Mul", g.silu(g.matmul(x, gate)), g.matmul(x, up))
        x = g.matmul(hidden, down, module="shared.down_proj")
    model = g.model(x)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, HIDDEN)).astype(np.float32)}
    feeds["input_ids"] = np.zeros((2, 3), dtype=np.int64)
    (wanted,) = tiny_models.session(model).run(None, feeds)
    report = rewrite_ffns(model, plan(["shared.down_proj"]))
    assert [ffn.node for ffn in report.ffns] == ["shared", "shared.2"]
    assert [ffn.shares_weights_with for ffn in report.ffns] == [None, "shared"]
    assert sum(name.endswith(".w_in") for name in model.graph.initializers) == 1
    load = np.full((2, 3), np.inf, dtype=np.float32)
    found = tiny_models.session(model).run(None, {**feeds, "load": load})
    np.testing.assert_allclose(found[0], wanted, atol=1e-5)
    assert model.graph.outputs[0].name == x.name.removesuffix(".replaced")


def test_refusals_leave_the_graph_alone() -> None:
    model = tiny_models.export_tiny("llama")
    names = tiny_models.ffn_names("llama")
    before = ir.to_proto(model).SerializeToString()
    wrong = {
        "granule": plan(names, granule=7),
        "external": plan(names, score="external"),
        "threshold": {name: replace(each, threshold=np.ones(3, np.float32)) for name, each in plan(names).items()},
        "negative": {name: replace(each, threshold=-np.ones(1, np.float32)) for name, each in plan(names).items()},
    }
    for rewrites in wrong.values():
        with pytest.raises(ContractError, match=r"model\.layers\.0\.mlp\.down_proj: "):
            rewrite_ffns(model, rewrites)
    assert ir.to_proto(model).SerializeToString() == before


def test_a_graph_without_tokens_is_refused() -> None:
    g = Handmade()
    model = g.model(g.swiglu())
    model.graph.inputs.pop(0)
    with pytest.raises(ir.passes.PreconditionError, match="input_ids"):
        rewrite_ffns(model, {})
