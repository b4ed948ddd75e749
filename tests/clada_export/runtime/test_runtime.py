"""The engine over a small hand-made graph whose result is known in closed form: attention is a masked causal sum."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from clada_export.artifact.manifest import CacheTensor, Manifest, TensorSpec, file_record, write_manifest
from clada_export.cli import main
from clada_export.errors import BackendError, UsageError, VerificationError
from clada_export.load.meter import LoadMeter, surprisal_entropy
from clada_export.load.signal import LoadSignal
from clada_export.plan.layer import LayerPlan
from clada_export.plan.plan import SparsityPlan
from clada_export.runtime import Engine, load_engine
from clada_export.runtime import engine as engine_module
from clada_export.runtime.sampling import Sampler, SamplingSettings
from graph_passes.load_outputs import AddLoadOutputs

VOCABULARY, WIDTH, POSITIONS, LAYERS, EOS = 11, 6, 24, 2, 7
SIGNAL = LoadSignal(surprisal_mean=1.0, surprisal_std=0.5, entropy_mean=1.0, entropy_std=0.5, entropy_weight=0.5)
RANDOM = np.random.default_rng(3)
EMBEDDING = RANDOM.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
POSITION = RANDOM.normal(size=(POSITIONS, WIDTH)).astype(np.float32)
HEAD = RANDOM.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
LOAD_HEAD = RANDOM.normal(size=VOCABULARY).astype(np.float32)


def make_graph() -> onnx.ModelProto:
    """Keys are the embeddings and values twice that; the context is the sum of both over the visible tokens."""
    shape: list[str | int | None] = ["batch", 1, "past", WIDTH]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("load", TensorProto.FLOAT, ["batch", "sequence"]),
        helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("past_key_values.0.value", TensorProto.FLOAT, shape),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", VOCABULARY]),
        helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, ["batch", 1, "total", WIDTH]),
        helper.make_tensor_value_info("present.0.value", TensorProto.FLOAT, ["batch", 1, "total", WIDTH]),
        helper.make_tensor_value_info("active_neurons", TensorProto.INT32, ["batch", LAYERS, "sequence"]),
    ]
    constants = {
        "embedding": EMBEDDING,
        "position": POSITION,
        "head": HEAD,
        "load_head": LOAD_HEAD,
        "two": np.float32(2),
        "zero": np.float32(0),
        "zero_i": np.int64(0),
        "one_i": np.int64(1),
        "axis_0": np.array([0]),
        "axis_1": np.array([1]),
        "axis_2": np.array([2]),
        "neurons": np.array([[[5]], [[9]]], np.float32).reshape(1, LAYERS, 1),
        "limit": np.float32(4),
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["embedding", "input_ids"], ["x"]),
        node("Unsqueeze", ["x", "axis_1"], ["key"]),
        node("Mul", ["key", "two"], ["value"]),
        node("Concat", ["past_key_values.0.key", "key"], ["present.0.key"], axis=2),
        node("Concat", ["past_key_values.0.value", "value"], ["present.0.value"], axis=2),
        node("Shape", ["past_key_values.0.key"], ["past_shape"], start=2, end=3),
        node("Shape", ["present.0.key"], ["total_shape"], start=2, end=3),
        node("Squeeze", ["past_shape", "axis_0"], ["past"]),
        node("Squeeze", ["total_shape", "axis_0"], ["total"]),
        node("Range", ["zero_i", "total", "one_i"], ["columns"]),
        node("Range", ["past", "total", "one_i"], ["queries_flat"]),
        node("Unsqueeze", ["queries_flat", "axis_1"], ["queries"]),
        node("LessOrEqual", ["columns", "queries"], ["causal"]),
        node("Cast", ["causal"], ["causal_f"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["attention_mask", "axis_1"], ["mask"]),
        node("Cast", ["mask"], ["mask_f"], to=TensorProto.FLOAT),
        node("Mul", ["causal_f", "mask_f"], ["visible"]),
        node("Add", ["present.0.key", "present.0.value"], ["memory_4"]),
        node("Squeeze", ["memory_4", "axis_1"], ["memory"]),
        node("MatMul", ["visible", "memory"], ["context"]),
        node("Gather", ["position", "position_ids"], ["where"]),
        node("Add", ["context", "where"], ["hidden"]),
        node("MatMul", ["hidden", "head"], ["plain"]),
        node("IsInf", ["load"], ["infinite"]),
        node("Where", ["infinite", "zero", "load"], ["finite_load"]),
        node("Unsqueeze", ["finite_load", "axis_2"], ["load_3"]),
        node("Mul", ["load_3", "load_head"], ["shift"]),
        node("Add", ["plain", "shift"], ["logits"]),
        node("IsInf", ["load"], ["skipped"], detect_positive=0),
        node("Unsqueeze", ["skipped", "axis_1"], ["skipped_3"]),
        node("Where", ["skipped_3", "zero", "neurons"], ["active_f"]),
        node("Cast", ["active_f"], ["active_neurons"], to=TensorProto.INT32),
    ]
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def with_load_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph as the targets write it today: it returns what the load needs of the logits."""
    graph = ir.from_proto(model)
    AddLoadOutputs()(graph)
    return ir.to_proto(graph)


def expected_logits(tokens: list[int], load: float = math.inf) -> np.ndarray:
    """[len(tokens), VOCABULARY]: what the graph means, for one sequence at one load."""
    context = 3 * np.cumsum(EMBEDDING[tokens].astype(np.float64), axis=0)
    plain = (context + POSITION[: len(tokens)]) @ HEAD.astype(np.float64)
    return plain + (0.0 if math.isinf(load) else load) * LOAD_HEAD


def make_manifest(graph: onnx.GraphProto | None = None, **changes: Any) -> Manifest:
    def specs(values: Any) -> tuple[TensorSpec, ...]:
        names = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.INT32: "int32"}
        return tuple(
            TensorSpec(
                value.name,
                names[value.type.tensor_type.elem_type],
                tuple(axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim),
            )
            for value in values
        )

    graph = graph or make_graph().graph
    plan = SparsityPlan(
        policy="clada",
        score="gate",
        rule="threshold",
        layers=(LayerPlan("model.layers.0.mlp.down_proj", "silu", True, WIDTH, 16, (0.1,)),),
        load=SIGNAL,
        source={"weights_digest": "0" * 64},
    )
    values: dict[str, Any] = {
        "tool_version": "0.1.0",
        "source": {"name": "tiny", "kind": "folder", "revision": None, "weights_digest": "0" * 64, "files": {}},
        "target": "ort",
        "op": {"domain": "com.clada", "name": "SparseFFN", "version": 1},
        "plan": plan.to_dict(),
        "load_signal": SIGNAL,
        "inputs": specs(graph.input),
        "outputs": specs(graph.output),
        "dtype": "float32",
        "cache": tuple(
            CacheTensor(0, role, f"past_key_values.0.{role}", f"present.0.{role}", "float32", ("batch", 1, "past", WIDTH))
            for role in ("key", "value")
        ),
        "versions": {"onnx": onnx.__version__},
    }
    return Manifest(**{**values, **changes})


def write_export(folder: Path, *, load_outputs: bool = True, **changes: Any) -> Path:
    """A whole export folder of the hand-made graph; without `load_outputs` as exports were before they had them."""
    folder.mkdir(parents=True, exist_ok=True)
    model = with_load_outputs(make_graph()) if load_outputs else make_graph()
    onnx.save(model, folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": POSITIONS, "vocab_size": VOCABULARY}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS]}))
    files = {path.name: file_record(path) for path in sorted(folder.iterdir()) if path.name != "clada.json"}
    write_manifest(folder, make_manifest(model.graph, **changes).with_files(files))
    return folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_engine(write_export(tmp_path_factory.mktemp("export") / "tiny"), threads=1)


PROMPTS = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(PROMPTS, st.integers(1, 3))
def test_left_padding_changes_nothing(engine: Engine, prompts: list[list[int]], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "PREFILL_CHUNK", chunk)
        output = engine.prefill(prompts)
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(output.logits[row], expected_logits(prompt)[-1], rtol=1e-4, atol=1e-4)
    tokens = [prompt[0] for prompt in prompts]
    output = engine.step(tokens, 1.5)
    for row, prompt in enumerate(prompts):
        wanted = expected_logits([*prompt, tokens[row]], 1.5)[-1]
        np.testing.assert_allclose(output.logits[row], wanted, rtol=1e-4, atol=1e-4)


def test_a_row_at_minus_infinity_is_left_as_it_was(engine: Engine) -> None:
    engine.prefill([[1, 2], [3]])
    output = engine.step([4, 5], [np.inf, -np.inf])
    assert output.active is not None
    assert output.active.tolist() == [[5, 9], [0, 0]]
    output = engine.step([6, 6], np.inf)
    np.testing.assert_allclose(output.logits[0], expected_logits([1, 2, 4, 6])[-1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(output.logits[1], expected_logits([3, 6])[-1], rtol=1e-4, atol=1e-4)


def test_matrices_that_are_not_packed(engine: Engine) -> None:
    """The same numbers, from weights that stay in the file."""
    rows = [[1, 2, 3], [4, 5]]
    found = load_engine(engine.folder, threads=1, packed=False).logits(rows)
    for one, other in zip(found, engine.logits(rows), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(PROMPTS)
def test_generate_follows_the_definition(engine: Engine, prompts: list[list[int]]) -> None:
    result = engine.generate(prompts, 6, load="auto")
    meter = LoadMeter(SIGNAL)
    for row, prompt in enumerate(prompts):
        text, load = list(prompt), math.inf
        for index, token in enumerate(result.tokens[row]):
            logits = expected_logits(text)[-1] + (0 if math.isinf(load) else load) * LOAD_HEAD
            assert logits[token] == pytest.approx(logits.max(), abs=1e-4)
            text.append(token)
            if index + 1 < len(result.tokens[row]):
                load = float(meter.update(logits[None], [token])[0])
                assert result.loads[index, row] == pytest.approx(load, abs=1e-3)
        ended = len(result.tokens[row]) - 1
        assert np.all(result.loads[ended:, row] == -np.inf)
        assert result.active is not None
        assert np.all(result.active[ended:, row] == 0)
        assert result.finish[row] == ("eos" if result.tokens[row][-1] == EOS else "length")
        assert EOS not in result.tokens[row][:-1]


def test_generate_reports_times_and_shapes(engine: Engine) -> None:
    seen: list[tuple[int, int, str]] = []
    result = engine.generate([[1], [2, 3]], 4, load="dense", eos_token_id=[], stream=lambda *item: seen.append(item))
    assert [len(row) for row in result.tokens] == [4, 4]
    assert result.loads.shape == (3, 2)
    assert np.all(result.loads == np.inf)
    assert result.active is not None
    assert result.active.shape == (3, 2, LAYERS)
    assert len(result.decode_s) == 3
    assert result.ttft_s > 0
    assert result.texts is None
    assert result.finish == ["length", "length"]
    assert [token for row, token, _ in seen if row == 1] == result.tokens[1]


def test_generate_stops_where_the_context_ends(engine: Engine) -> None:
    result = engine.generate([[1] * POSITIONS, [2]], 5, eos_token_id=[])
    assert result.finish == ["context", "length"]
    assert [len(row) for row in result.tokens] == [1, 5]


def test_sampling_is_determined_by_the_seed(engine: Engine) -> None:
    def run(seed: int) -> list[list[int]]:
        return engine.generate([[1], [2]], 8, temperature=3.0, seed=seed, eos_token_id=[]).tokens

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_the_load_is_measured_at_temperature_one(engine: Engine) -> None:
    result = engine.generate([[1]], 3, temperature=50.0, seed=5, eos_token_id=[])
    surprisal, entropy = surprisal_entropy(expected_logits([1])[-1:], result.tokens[0][:1])
    wanted = (surprisal[0] - 1) / 0.5 + 0.5 * (entropy[0] - 1) / 0.5
    assert result.loads[0, 0] == pytest.approx(np.clip(wanted, -4, 4), abs=1e-3)


@given(st.floats(0.1, 5), st.integers(0, 5), st.floats(0.01, 1), st.integers(0, 2**31))
def test_filters_keep_only_the_best_tokens(temperature: float, top_k: int, top_p: float, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(3, 9)).astype(np.float32)
    chosen = Sampler(SamplingSettings(temperature, top_k, top_p, seed), 3).choose(logits)
    for row, token in zip(logits.astype(np.float64), chosen, strict=True):
        better = row[row > row[token]]
        weights = np.exp((row - row.max()) / temperature)
        assert not top_k or len(better) < top_k
        kept = np.sort(weights)[::-1][: top_k or None].sum() if not top_k else weights.sum()
        assert weights[row > row[token]].sum() / kept < top_p + 1e-9


def test_sampling_frequencies_match_the_distribution() -> None:
    logits = np.log(np.array([[0.6, 0.3, 0.1]]))
    sampler = Sampler(SamplingSettings(temperature=1.0, seed=0), 1)
    counts = np.bincount([sampler.choose(logits)[0] for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.6, 0.3, 0.1], atol=0.03)


def test_no_finite_logit_is_a_failed_verification() -> None:
    with pytest.raises(VerificationError, match="no finite logit"):
        Sampler(SamplingSettings(), 1).choose(np.full((1, 4), np.nan))


@settings(deadline=None, max_examples=20)
@given(PROMPTS, st.integers(1, 3))
def test_the_graph_gives_what_the_load_needs(engine: Engine, prompts: list[list[int]], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "PREFILL_CHUNK", chunk)
        outputs = [engine.prefill(prompts), engine.step([prompt[0] for prompt in prompts], 0.5)]
    for output in outputs:
        assert output.log_sum_exp is not None and output.entropy is not None
        values = output.logits.astype(np.float64)
        best = output.logits.argmax(-1)
        surprisal, entropy = surprisal_entropy(values, best)
        np.testing.assert_allclose(output.log_sum_exp, values.max(-1) + surprisal, rtol=1e-5)
        np.testing.assert_allclose(output.entropy, entropy, rtol=1e-4, atol=1e-5)


def test_an_older_export_gives_the_same_loads(engine: Engine, tmp_path: Path) -> None:
    older = load_engine(write_export(tmp_path / "older", load_outputs=False), threads=1)
    assert older.prefill([[1]]).entropy is None
    results = [which.generate([[1, 2, 3], [4]], 8, eos_token_id=[]) for which in (engine, older)]
    assert results[0].tokens == results[1].tokens
    np.testing.assert_allclose(results[0].loads, results[1].loads, rtol=1e-4, atol=1e-5)


def test_the_rule_of_the_manifest_decides(tmp_path: Path) -> None:
    signal = replace(SIGNAL, rule="affine", parameters={"low": 0.5, "high": 2.0}, slope=0.5)
    engine = load_engine(write_export(tmp_path / "x", load_signal=signal), threads=1)
    result = engine.generate([[1, 2]], 6, eos_token_id=[])
    plain = engine.generate([[1, 2]], 2, eos_token_id=[])
    surprisal, entropy = surprisal_entropy(expected_logits([1, 2])[-1:], plain.tokens[0][:1])
    drive = (surprisal[0] - 1) / 0.5 + 0.5 * (entropy[0] - 1) / 0.5
    assert result.loads[0, 0] == pytest.approx(-np.log(np.clip(1 - 0.5 * drive, 0.5, 2.0)) / 0.5, abs=1e-3)
    assert np.abs(result.loads).max() <= np.log(2) / 0.5 + 1e-6


def test_inspect_names_a_rule_that_is_not_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_manifest().plan
    load = {**plan["load"], "rule": "gate", "parameters": {"window": 12}, "momentum": 0.05}
    for name, used, said in (("plain", plan, ""), ("gate", {**plan, "load": load}, "rule gate, window 12; momentum 0.05")):
        assert main(["inspect", str(write_export(tmp_path / name, plan=used))]) == 0
        found = [line.strip() for line in capsys.readouterr().out.splitlines() if "momentum" in line]
        assert found == ([said] if said else [])


def test_a_rule_with_a_memory_starts_anew_with_each_text(tmp_path: Path) -> None:
    signal = replace(SIGNAL, rule="rank", parameters={"momentum": 0.5}, momentum=0.2)
    engine = load_engine(write_export(tmp_path / "x", load_signal=signal), threads=1)
    first, second = (engine.generate([[1, 2], [3]], 8, eos_token_id=[]) for _ in range(2))
    np.testing.assert_array_equal(first.loads, second.loads)
    assert len(np.unique(first.loads)) > 4


def test_a_load_from_outside(engine: Engine) -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def signal(surprisal: np.ndarray, entropy: np.ndarray) -> np.ndarray:
        seen.append((surprisal, entropy))
        return np.array([0.25 * len(seen), np.inf])

    result = engine.generate([[1, 2], [3]], 4, load=signal, eos_token_id=[])
    np.testing.assert_allclose(result.loads, [[0.25, np.inf], [0.5, np.inf], [0.75, np.inf]])
    surprisal, entropy = surprisal_entropy(expected_logits([1, 2])[-1:], result.tokens[0][:1])
    np.testing.assert_allclose([seen[0][0][0], seen[0][1][0]], [surprisal[0], entropy[0]], rtol=1e-4, atol=1e-4)
    seen.clear()
    rows = [prompt + new for prompt, new in zip(result.prompt_tokens, result.tokens, strict=True)]
    scores = engine.score([rows[0], [3, *result.tokens[1]][:5]], signal, prompt_length=2)
    assert len(seen) == 3 and [len(row) for row in scores] == [4, 3]
    for bad, said in (
        (lambda s, h: 0.5, "one load a row"),
        (lambda s, h: s * np.nan, "NaN"),
        (lambda s, h: s - np.inf, "-inf"),
    ):
        with pytest.raises(UsageError, match=said):
            engine.generate([[1], [2]], 3, load=bad, eos_token_id=[])


def test_logits_and_score_of_ragged_rows(engine: Engine) -> None:
    rows = [[1, 2, 3, 4], [5, 6]]
    engine.prefill([[9]])
    for load in (math.inf, -1.25):
        for row, logits in zip(rows, engine.logits(rows, load), strict=True):
            np.testing.assert_allclose(logits, expected_logits(row, load), rtol=1e-4, atol=1e-4)
        for row, score in zip(rows, engine.score(rows, load), strict=True):
            values = expected_logits(row, load)[:-1]
            wanted = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
            np.testing.assert_allclose(score, wanted[np.arange(len(row) - 1), row[1:]], rtol=1e-4, atol=1e-4)
    assert engine.step([1]).logits.shape == (1, VOCABULARY)


def test_score_at_its_own_load_is_what_generate_saw(engine: Engine) -> None:
    result = engine.generate([[1, 2], [3, 4]], 5, load="auto", eos_token_id=[])
    rows = [prompt + new for prompt, new in zip(result.prompt_tokens, result.tokens, strict=True)]
    scores = engine.score([*rows, rows[0][:4]], "auto", prompt_length=2)
    assert [len(score) for score in scores] == [5, 5, 2]
    np.testing.assert_allclose(scores[2], scores[0][:2], rtol=1e-5)
    for row, score in enumerate(scores[:2]):
        logits = expected_logits(rows[row][:6], float(result.loads[3, row]))[-1]
        assert score[4] == pytest.approx(logits[rows[row][6]] - np.log(np.exp(logits).sum()), abs=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.generate([[1]], 0), "max_new_tokens is 0"),
        (lambda e: e.generate([[1]], -1), "max_new_tokens is -1"),
        (lambda e: e.generate([[1]], 2.5), "max_new_tokens is 2.5"),
        (lambda e: e.generate([], 1), "no prompt"),
        (lambda e: e.generate([[]], 1), "prompt 0 has no tokens"),
        (lambda e: e.generate([[1], []], 1), "prompt 1 has no tokens"),
        (lambda e: e.generate([[1.5]], 1), "not a list of token ids"),
        (lambda e: e.generate([[[1]]], 1), "not a list of token ids"),
        (lambda e: e.generate([[VOCABULARY]], 1), "token id 11 is out of range"),
        (lambda e: e.generate([[-1]], 1), "token id -1 is out of range"),
        (lambda e: e.generate([[1] * (POSITIONS + 1)], 1), "25 tokens, and the model takes at most 24"),
        (lambda e: e.generate("text", 1), "has no tokenizer"),
        (lambda e: e.generate([[1]], 1, load=math.nan), "load is nan"),
        (lambda e: e.generate([[1]], 1, load=-math.inf), "load is -inf"),
        (lambda e: e.generate([[1]], 1, load="fast"), "load is 'fast'"),
        (lambda e: e.generate([[1]], 1, load=True), "load is True"),
        (lambda e: e.generate([[1]], 1, temperature=-1.0), "temperature is -1.0"),
        (lambda e: e.generate([[1]], 1, top_p=0.0), "top_p is 0.0"),
        (lambda e: e.generate([[1]], 1, top_k=-2), "top_k is -2"),
        (lambda e: e.generate([[1]], 1, seed=-2), "seed is -2"),
        (lambda e: (e.prefill([[1]]), e.step([1], math.nan)), "load is NaN"),
        (lambda e: (e.prefill([[1]]), e.step([1, 2])), "wants 1 tokens"),
        (lambda e: (e.prefill([[1] * POSITIONS]), e.step([1])), "the longest that the model takes"),
        (lambda e: e.score([[1]]), "below the shortest row"),
    ],
)
def test_wrong_use(engine: Engine, call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(engine)


def test_text_prompts(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "tiny"
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "w9", "chat_template": "{{ bos_token }} {% for m in messages %}{{ m.content }}{% endfor %}"})
    )
    engine = load_engine(write_export(folder, tokenizer=True), threads=1)
    pieces: list[str] = []
    result = engine.generate(
        ["w1 w2", "w3"], 3, eos_token_id=[], stream=lambda row, _, text: pieces.append(text) if row else None
    )
    assert result.prompt_tokens == [[1, 2], [3]]
    assert result.texts is not None
    assert result.texts[1] == " ".join(f"w{token}" for token in result.tokens[1])
    assert "".join(pieces).split() == result.texts[1].split()
    assert engine.tokenizer is not None
    assert engine.tokenizer.chat([{"role": "user", "content": "w4"}]) == [9, 4]
    with pytest.raises(UsageError, match="prompt 0 is empty"):
        engine.generate("", 1)
    with pytest.raises(UsageError, match="all as text or all as token ids"):
        engine.generate(["w1", [1]], 1)  # type: ignore[arg-type]


def test_load_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        load_engine(tmp_path / "nope")
    with pytest.raises(UsageError, match="threads is 0"):
        load_engine(write_export(tmp_path / "a"), threads=0)
    with pytest.raises(UsageError, match="names no TensorRT engine"):
        load_engine(write_export(tmp_path / "b", target="trt"))
    with pytest.raises(BackendError, match=r"version 2, and this program runs .* version 1"):
        load_engine(write_export(tmp_path / "c", op={"domain": "com.clada", "name": "SparseFFN", "version": 2}))
    with pytest.raises(UsageError, match=r"past_key_values\.0\.value"):
        load_engine(write_export(tmp_path / "d", cache=make_manifest().cache[:1]))
    with pytest.raises(BackendError, match="custom-op library is missing"):
        load_engine(write_export(tmp_path / "e"), library=tmp_path / "libnope.so")


def test_a_library_that_went_missing(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "libclada_ort.so").write_bytes(b"not a library")
    write_export(folder, library="libclada_ort.so")
    (folder / "libclada_ort.so").unlink()
    with pytest.raises(BackendError, match="custom-op library is missing"):
        load_engine(folder)


def test_a_damaged_graph(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "x")
    (folder / "model.onnx").write_bytes(b"\x00" * 10)
    files = {path.name: file_record(path) for path in folder.iterdir() if path.name != "clada.json"}
    write_manifest(folder, make_manifest().with_files(files))
    with pytest.raises(BackendError, match="can't load the graph"):
        load_engine(folder)


def test_starts_without_torch_and_transformers() -> None:
    heavy = ("torch", "transformers", "jinja2", "huggingface_hub")
    code = f"import sys, clada_export.runtime; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
