"""Merged experts: the graph against the eager reference, segments, the state between runs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from clada_export.calibration.calibrate import CalibrationOptions, calibrate
from clada_export.calibration.drift import DriftMeter
from clada_export.calibration.segment_state import measure_segment_state
from clada_export.calibration.text import load_calibration_data
from clada_export.decoder.ffn import find_eager_ffns
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UsageError
from clada_export.methods import PolicySettings, get_policy
from clada_export.pipeline import ExportOptions, ExportResult, export
from clada_export.plan.method import Method
from clada_export.plan.plan import SparsityPlan
from clada_export.runtime import Engine, load_engine
from clada_export.verify.eager import ReferenceModel
from tests.tiny_models import tiny_model

Folder = Callable[[str], Path]
OPTIONS = ExportOptions(
    policy="lory", sparsity=0.5, calibration_context=48, load_response=False, settings=PolicySettings(rows=200), verify=False
)
PROMPT = [5, 6, 7, 8, 9, 10, 11]
DECODED = [20, 21, 22, 23, 24, 25]
INF = np.float32(np.inf)


def made(model_folder: Folder, kind: str, out: Path, **changes: object) -> tuple[ExportResult, Engine]:
    result = export(model_folder(kind), out, replace(OPTIONS, **changes))  # type: ignore[arg-type]
    return result, load_engine(out)


def decode(engine: Engine, prompts: list[list[int]], loads: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Logits [1 + steps, B, V] and active neurons [steps, B, layers]."""
    output = engine.prefill(prompts)
    logits, active = [output.logits.copy()], []
    for token, load in zip(DECODED, loads, strict=True):
        output = engine.step([token] * len(prompts), load)
        assert output.active is not None
        logits.append(output.logits.copy())
        active.append(output.active.copy())
    return np.stack(logits), np.stack(active)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_the_graph_is_the_reference(
    kind: str, sparsity: float, model_folder: Folder, kept_traces: None, tmp_path: Path
) -> None:
    """Gated, and plain with biases; a dense step in the middle is a segment of its own."""
    result, engine = made(model_folder, kind, tmp_path / "out", sparsity=sparsity)
    experts = round(1 / (1 - sparsity))
    assert {layer.merge for layer in result.plan.layers} == {experts}
    assert result.plan.expected_sparsity == pytest.approx(sparsity)
    assert result.plan.calibration.relative_bytes == pytest.approx(1 / experts)
    model = tiny_model(kind, 0)
    reference = ReferenceModel(TorchDecoder(model), result.plan)
    loads = [0.0, -1.0, INF, 0.5, 0.0, 2.0]
    logits, active = decode(engine, [PROMPT], loads)
    run = reference.run(PROMPT + DECODED, np.array([INF] * len(PROMPT) + loads, np.float32))
    assert np.abs(logits[:, 0] - run.logits[len(PROMPT) - 1 :]).max() < 3e-4
    assert (active[:, 0] == run.active[:, len(PROMPT) :].T).all()
    assert set(active[2].flatten()) == {96} and set(np.delete(active, 2, 0).flatten()) == {96 // experts}
    # The dense step changed what runs after it.
    still = decode(engine, [PROMPT], [0.0, -1.0, 0.0, 0.5, 0.0, 2.0])[0]
    assert np.array_equal(still[:3], logits[:3]) and np.abs(still[-1] - logits[-1]).max() > 1e-3
    dense = TorchDecoder(model).dense_logits(PROMPT + DECODED)
    assert np.abs(logits[1, 0] - dense[len(PROMPT)]).max() > 1e-2


def test_calibration_measures_what_the_reference_runs() -> None:
    model = tiny_model("llama", 0)
    ffns = find_eager_ffns(model).found
    data = load_calibration_data(None, 256, context=48)
    options = CalibrationOptions(sparsity=0.5)
    policy = get_policy("lory", PolicySettings(rows=200))
    plan = calibrate(TorchDecoder(model), policy, data, {"weights_digest": "0"}, options).plan
    window, prompt = data.heldout[0], 8
    meter = DriftMeter(TorchDecoder(model), window[None], prompt)
    found = measure_segment_state(meter, ffns, Method("plan", plan.score, plan.rule, plan.layers, plan.arrays))
    loads = np.where(np.arange(len(window)) < prompt, INF, np.float32(0.0))
    run = ReferenceModel(TorchDecoder(model), plan).run(window.tolist(), loads)
    log_p = torch.from_numpy(run.logits).log_softmax(-1)[prompt:-1]
    np.testing.assert_allclose(found.drift.nll, -log_p.gather(1, window[prompt + 1 :, None]).flatten(), rtol=1e-4, atol=1e-4)
    assert (run.active[:, :prompt] == 96).all() and (run.active[:, prompt:] == 48).all()
    assert found.drift.mean_kl > 0 and (found.error > 0).all()


def test_a_batch_of_ragged_prompts(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    """Every row has its own merged FFN; a dense step of one row alone leaves the other's as it was."""
    _, engine = made(model_folder, "llama", tmp_path / "out")
    prompts = [PROMPT, [40, 41, 42]]
    columns = [np.array([0.0, 0.0]), np.array([INF, 0.0]), np.array([0.0, 0.0]), np.array([-np.inf, 0.0])]
    together = [engine.prefill(prompts).logits.copy()]
    together += [engine.step([token] * 2, loads).logits.copy() for token, loads in zip(DECODED[:4], columns, strict=True)]
    for row, prompt in enumerate(prompts):
        alone = [engine.prefill([prompt]).logits.copy()]
        for token, loads in zip(DECODED[:4], columns, strict=True):
            if np.isneginf(loads[row]):
                break
            alone.append(engine.step([token], loads[[row]]).logits.copy())
        for step, wanted in enumerate(alone):
            assert np.abs(together[step][row] - wanted[0]).max() < 3e-4, (row, step)


def test_the_state_stays_where_nothing_was_merged(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    _, engine = made(model_folder, "llama", tmp_path / "out")
    engine.prefill([PROMPT])
    assert engine._state is not None
    names = [tensor.past for tensor in engine.manifest.cache if tensor.role.startswith("merged")]
    assert len(names) == 4  # in and out of two layers
    before = dict(engine._state.cache.handed)
    engine.step([20], 0.0)
    assert all(engine._state.cache.handed[name] is before[name] for name in names)
    engine.step([21], INF)
    for name in names:
        assert np.abs(engine._state.cache.handed[name].numpy() - before[name].numpy()).max() > 0
    engine.step([22], -np.inf)
    assert np.isfinite(engine._state.cache.handed[names[0]].numpy()).all()


def test_a_text_without_a_segment_runs_dense(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    _, engine = made(model_folder, "llama", tmp_path / "out")
    assert np.allclose(engine.logits([PROMPT], 0.0)[0], engine.logits([PROMPT], "dense")[0], atol=1e-5)


def test_16_bit_weights(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    result, _ = made(model_folder, "llama", tmp_path / "out", dtype="bfloat16", verify=True)
    assert result.verification is not None and result.verification.passed


def test_the_op_stays_for_dense_rows_and_the_rest_is_conditional(
    model_folder: Folder, kept_traces: None, tmp_path: Path
) -> None:
    made(model_folder, "llama", tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("SparseFFN") == 2 and kinds.count("If") == 4
    inside = [node.op_type for node in graph.node if node.op_type == "If" for a in node.attribute for node in a.g.node]
    assert inside.count("Softmax") == 2  # routers run only where they are needed


def test_a_budget_that_two_experts_keep(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    result, _ = made(model_folder, "llama", tmp_path / "out", sparsity=None, budget="kl=1.99")
    assert {layer.merge for layer in result.plan.layers} == {2}
    with pytest.raises(UsageError, match=r"no sparsity keeps the budget kl=1e-09: merging 2 experts.* already costs"):
        made(model_folder, "llama", tmp_path / "other", sparsity=None, budget="kl=1e-9")


def test_pruned_neurons_are_left_out(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    result, _ = made(model_folder, "llama", tmp_path / "out", prune="wanda=neurons:0.25", verify=True)
    assert result.verification is not None and result.verification.passed
    assert result.plan.layers[0].kept_neurons == 72


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sparsity": 0.6}, r"a sparsity of 1 - 1 / E, not 0.6 .*; the nearest is --sparsity 0.6667 \(E = 3\)"),
        ({"sparsity": 0.8}, r"96 neurons, which 5 experts do not divide\); the nearest is --sparsity 0.8333 \(E = 6\)"),
        ({"settings": PolicySettings(granule=8)}, "leave --granule out"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], said: str, model_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        export(model_folder("llama"), tmp_path / "out", replace(OPTIONS, **change))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_tensorrt_is_refused() -> None:
    with pytest.raises(UsageError, match=r"does not run on TensorRT: .* use --target ort"):
        replace(OPTIONS, target="trt").check()


def test_plans_that_merge_are_read_back(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    result, _ = made(model_folder, "llama", tmp_path / "out")
    result.plan.save(tmp_path / "plan.json")
    assert SparsityPlan.load_file(tmp_path / "plan.json").to_dict() == result.plan.to_dict()
    value = result.plan.to_dict()
    value["layers"][0]["merge"] = 5
    with pytest.raises(UsageError, match="merges 5 experts: they must divide its 96 neurons"):
        SparsityPlan.from_dict(value)


def test_the_policy_is_trained_and_seeded(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    assert get_policy("lory").segment_state and not get_policy("griffin").segment_state
    first, second = (made(model_folder, "llama", tmp_path / name)[0] for name in ("a", "b"))
    assert first.plan.to_dict()["tensors"] == second.plan.to_dict()["tensors"]
    training = first.plan.calibration.details["training"]
    assert all(torch.tensor(report["metrics"]["error"]).isfinite() for report in training["layers"].values())
