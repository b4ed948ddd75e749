"""The compiler end to end on tiny random models of every family, and what it does when something is wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import clada_export
from clada_export.artifact.manifest import read_manifest
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import BackendError, CladaError, UnsupportedModelError, UsageError, VerificationError
from clada_export.export_options import ExportOptions
from clada_export.methods import PolicySettings
from clada_export.pipeline import export, verify_folder
from clada_export.plan.plan import SparsityPlan
from clada_export.runtime import load_engine
from tests.processes import start
from tests.tiny_models import KINDS, ffn_names, tiny_model

FEW = ("llama", "gemma3_text", "phi3", "gpt2")
"""Of each form of FFN one: SwiGLU, GeGLU, packed, and with biases. The others of `KINDS` are like one of these."""
OPTIONS = ExportOptions(sparsity=0.5, calibration_context=48, load_response=False)
Folder = Callable[[str], Path]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in FEW else pytest.mark.long) for kind in KINDS])
def test_every_family_compiles_and_verifies(kind: str, model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = export(model_folder(kind), out, OPTIONS)
    assert [layer.name for layer in result.plan.layers] == list(ffn_names(kind))
    assert result.verification is not None and result.verification.passed
    names = [check.name for check in result.verification.checks]
    assert sum("dense parity" in name for name in names) == 5
    assert sum("sparse parity" in name for name in names) == 2
    manifest = read_manifest(out)
    assert manifest.plan == result.plan.to_dict()
    report = json.loads((out / "report.json").read_text())
    assert [ffn["name"] for ffn in report["rewrite"]["ffns"]] == list(ffn_names(kind))
    drift = manifest.drift
    assert 0.2 < drift["sparsity"] < 0.8


def test_the_engine_runs_a_batch_like_single_rows(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    export(model_folder("llama"), tmp_path / "out", replace(OPTIONS, verify=False))
    engine = load_engine(tmp_path / "out")
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12]]
    together = engine.generate(prompts, 12, eos_token_id=[]).tokens
    alone = [engine.generate([prompt], 12, eos_token_id=[]).tokens[0] for prompt in prompts]
    assert together == alone
    # Denser is closer to dense: a high load changes fewer logits than a low one.
    dense = engine.logits(prompts[:1], "dense")[0]
    errors = [np.abs(engine.logits(prompts[:1], load)[0] - dense).mean() for load in (4.0, 0.0, -4.0)]
    assert errors[0] < errors[1] < errors[2]


def test_a_portable_engine_has_attention_in_standard_operators(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    export(model_folder("llama"), tmp_path / "fused", replace(OPTIONS, verify=False))
    result = export(model_folder("llama"), tmp_path / "portable", replace(OPTIONS, portable=True))
    assert result.verification is not None and result.verification.passed
    for name, fused in (("fused", True), ("portable", False)):
        graph = onnx.load(tmp_path / name / "model.onnx").graph
        assert any(node.op_type == "GroupQueryAttention" for node in graph.node) is fused
    assert all(tensor.in_place is None for tensor in result.manifest.cache)
    made = [load_engine(tmp_path / name).generate([[5, 6, 7]], 8, eos_token_id=[]).tokens for name in ("fused", "portable")]
    assert made[0] == made[1]
    # On a GPU, ONNX Runtime has no such node in float32.
    with pytest.raises(BackendError, match=r"device cuda: the attention of this engine .* export with --portable"):
        load_engine(tmp_path / "fused", device="cuda")
    with pytest.raises(UsageError, match="--portable is for --target ort"):
        export(model_folder("llama"), tmp_path / "other", replace(OPTIONS, portable=True, target="trt"))


def test_the_same_pins_give_the_same_bytes(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(model_folder("llama"), tmp_path / name, OPTIONS)
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {path.name for path in (tmp_path / "b").iterdir()}
    for name in sorted(files):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_weights(dtype: str, model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    result = export(model_folder("llama"), tmp_path / "out", replace(OPTIONS, dtype=dtype))
    assert result.verification is not None and result.verification.passed
    assert any(f"stored as {dtype}" in warning for warning in result.manifest.warnings)
    again = verify_folder(tmp_path / "out", str(model_folder("llama")))
    assert again.passed


@pytest.mark.parametrize("score", ["gate", "exact"])
def test_other_scores(score: str, model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    result = export(model_folder("qwen2"), tmp_path / "out", replace(OPTIONS, settings=PolicySettings(score=score)))
    assert result.plan.score == score
    assert result.verification is not None and result.verification.passed


def test_a_plan_can_be_edited_and_passed_back(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    first = export(model_folder("llama"), tmp_path / "a", OPTIONS)
    layers = tuple(replace(layer, threshold=(0.0,)) for layer in first.plan.layers)
    first.plan.with_layers(layers).save(tmp_path / "plan.json")
    second = export(model_folder("llama"), tmp_path / "b", replace(OPTIONS, plan=tmp_path / "plan.json"))
    assert second.manifest.drift["sparsity"] == pytest.approx(0.0)
    with pytest.raises(UsageError, match="made for other weights"):
        export(model_folder("qwen2"), tmp_path / "c", replace(OPTIONS, plan=tmp_path / "plan.json"))
    renamed = tuple(replace(layer, name=f"other.{layer.name}") for layer in first.plan.layers)
    first.plan.with_layers(renamed).save(tmp_path / "plan.json")
    with pytest.raises(UsageError, match=r"layer 'other\.model\.layers\.0\.mlp\.down_proj' is not in this model"):
        export(model_folder("llama"), tmp_path / "c", replace(OPTIONS, plan=tmp_path / "plan.json"))
    grown = tuple(replace(layer, intermediate_size=97) for layer in first.plan.layers)
    first.plan.with_layers(grown).save(tmp_path / "plan.json")
    with pytest.raises(UsageError, match="64 x 97 in the plan and 64 x 96 in the model"):
        export(model_folder("llama"), tmp_path / "c", replace(OPTIONS, plan=tmp_path / "plan.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "plan.json"]


def test_verify_needs_the_model_that_was_exported(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    export(model_folder("llama"), tmp_path / "out", replace(OPTIONS, verify=False))
    assert verify_folder(tmp_path / "out", str(model_folder("llama"))).passed
    with pytest.raises(UsageError, match="--source"):
        verify_folder(tmp_path / "out")
    with pytest.raises(UsageError, match="is not the model that"):
        verify_folder(tmp_path / "out", str(model_folder("qwen2")))


def test_an_engine_that_computes_something_else_fails(
    model_folder: Folder, kept_traces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault between calibration and the engine is found: here the graph gets the weights of another seed."""
    from tests.clada_export.conftest import _kept_trace

    monkeypatch.setattr(
        "clada_export.pipeline.trace",
        lambda decoder, fusions: _kept_trace(TorchDecoder(tiny_model("llama", 1)), fusions=fusions),
    )
    with pytest.raises(VerificationError, match="dense parity, prompt"):
        export(model_folder("llama"), tmp_path / "out", OPTIONS)
    assert list(tmp_path.iterdir()) == []


# --- bad input: a clear error and nothing left ---


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"target": "tpu"}, UsageError, "unknown target 'tpu'; known: ort"),
        ({"dtype": "int3"}, UsageError, "unknown dtype 'int3'"),
        ({"policy": "magic"}, UsageError, "unknown policy 'magic'"),
        ({"budget": "ppl=0%"}, UsageError, "above 0%"),
        ({"budget": "ppl=200%"}, UsageError, "below 100%"),
        ({"sparsity": 1.0}, UsageError, "--sparsity 1 is out of range"),
        ({"sparsity": float("nan")}, UsageError, "--sparsity nan is out of range"),
        ({"calibration_context": 2}, UsageError, "--calibration-context 2 is out of range: it must be at least 8"),
        ({"plan": Path("/does/not/exist.json")}, UsageError, "can't be read"),
        ({"calibration_data": Path("a"), "calibration_tokens": Path("b")}, UsageError, "exclude each other"),
        ({"settings": PolicySettings(score="external")}, UsageError, "has no score 'external'"),
    ],
)
def test_bad_options(
    change: dict[str, object], error: type[CladaError], said: str, model_folder: Folder, kept_traces: None, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        export(model_folder("llama"), tmp_path / "out", OPTIONS, **change)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_transformers_does_not_write(
    model_folder: Folder, kept_traces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("GenerationConfig is invalid")

    monkeypatch.setattr("transformers.GenerationConfig.save_pretrained", refuse)
    with pytest.raises(UsageError, match=r"llama: generation_config.json: .* GenerationConfig is invalid"):
        export(model_folder("llama"), tmp_path / "out", replace(OPTIONS, verify=False))
    assert not (tmp_path / "out").exists()


def test_calibration_tokens(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 256, 2000))
    result = export(
        model_folder("llama"), tmp_path / "out", replace(OPTIONS, calibration_tokens=tmp_path / "tokens.npy", verify=False)
    )
    assert not any("random tokens" in warning for warning in result.manifest.warnings)
    np.save(tmp_path / "tokens.npy", np.arange(60))
    with pytest.raises(UsageError, match="60 tokens; calibration needs at least two windows of 48"):
        export(model_folder("llama"), tmp_path / "b", replace(OPTIONS, calibration_tokens=tmp_path / "tokens.npy"))
    assert not (tmp_path / "b").exists()


def test_a_model_with_experts_only(model_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp: mixture of experts"):
        export(model_folder("mixtral"), tmp_path / "out", OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"exists already|not an earlier export"):
            export(model_folder("llama"), out, replace(OPTIONS, overwrite=overwrite))
    assert (out / "precious").read_text() == "x"


def test_no_library(model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLADA_ORT_LIBRARY", str(tmp_path / "missing.so"))
    with pytest.raises(BackendError, match=r"missing\.so"):
        export(model_folder("llama"), tmp_path / "out", OPTIONS)
    (tmp_path / "missing.so").write_bytes(b"not a library")
    with pytest.raises(BackendError):
        export(model_folder("llama"), tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


STAGES = ("source", "calibrate", "trace", "rewrite and write", "verify")


class _Stop:
    """Raises when a stage begins or ends."""

    def __init__(self, stage: str, error: BaseException, at_end: bool) -> None:
        self._stage, self._error, self._at_end = stage, error, at_end

    def begin(self, stage: str) -> None:
        if stage == self._stage and not self._at_end:
            raise self._error

    def step(self, stage: str, what: str, done: int, total: int) -> None:
        pass

    def end(self, stage: str, seconds: float, note: str) -> None:
        if stage == self._stage and self._at_end:
            raise self._error


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupt_in_any_stage_leaves_nothing(
    stage: str, at_end: bool, model_folder: Folder, kept_traces: None, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(model_folder("llama"), tmp_path / "out", OPTIONS, progress=_Stop(stage, KeyboardInterrupt(), at_end))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UsageError, match="the disk is full"):
        export(model_folder("llama"), tmp_path / "out", OPTIONS, progress=_Stop("rewrite and write", full, True))
    assert list(tmp_path.iterdir()) == []


def test_a_real_interrupt(model_folder: Folder, tmp_path: Path) -> None:
    """SIGINT to the real process while it traces."""
    command = [sys.executable, "-m", "clada_export.cli", "export", str(model_folder("llama")), "--target", "ort"]
    command += ["-o", str(tmp_path / "out"), "--sparsity", "0.5", "--calibration-context", "48"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = start(command, environment)
    assert process.stderr is not None
    for line in process.stderr:
        if "calibrate" in line:
            break
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "nothing was left behind" in errors
    assert list(tmp_path.iterdir()) == []


def test_public_names() -> None:
    assert clada_export.export is export
    assert clada_export.load_engine is load_engine
    assert isinstance(clada_export.__version__, str)
    with pytest.raises(AttributeError):
        clada_export.nothing  # noqa: B018


def test_the_model_is_not_changed_by_an_export(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in model_folder("llama").iterdir()}
    export(model_folder("llama"), tmp_path / "out", replace(OPTIONS, dtype="bfloat16", verify=False))
    assert before == {path.name: path.read_bytes() for path in model_folder("llama").iterdir()}


def test_plans_are_the_same_with_other_thread_counts(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    plans: list[SparsityPlan] = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            plans.append(export(model_folder("llama"), tmp_path / str(count), replace(OPTIONS, verify=False)).plan)
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(plans[0].layers, plans[1].layers, strict=True):
        assert one.threshold[0] == pytest.approx(two.threshold[0], rel=1e-3)
