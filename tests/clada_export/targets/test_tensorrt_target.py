"""`--target trt` end to end on tiny models: built by TensorRT-RTX, the graph's numbers checked, the engine's deferred."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from clada_export.artifact.manifest import read_manifest
from clada_export.cli import main, main_export
from clada_export.decoder.rounding import in_dtype, round_all_weights
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import BackendError, UnsupportedModelError, UsageError, VerificationError
from clada_export.export_options import ExportOptions
from clada_export.native.library import trt_library_path
from clada_export.native.tensorrt import missing_gpu
from clada_export.pipeline import ExportResult, export, verify_folder
from clada_export.runtime import load_engine
from clada_export.targets.options import TensorRTOptions
from clada_export.targets.trt import target as target
from clada_export.targets.trt.target import LAYERS_NAME, engine_checks
from clada_export.verify.saved import CASES, INPUTS, OUTPUTS, check_saved
from tests.tiny_models import tiny_model

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
pytest.importorskip("polygraphy", reason="Polygraphy is not installed")
needs_no_gpu = pytest.mark.skipif(missing_gpu() is None, reason="this machine has a GPU")

Folder = Callable[[str], Path]
SMALL = TensorRTOptions(max_batch=2, compute_capabilities=("8.9",))
OPTIONS = ExportOptions(target="trt", tensorrt=SMALL, sparsity=0.5, calibration_context=48, load_response=False)
NO_PLUGIN = replace(OPTIONS, tensorrt=replace(SMALL, plugin=False))


@pytest.fixture(scope="module")
def plugin() -> Path:
    try:
        return trt_library_path()
    except BackendError as error:
        pytest.skip(f"the plugin library is not built: {error}")


@pytest.fixture(scope="module")
def dense_export(tmp_path_factory: pytest.TempPathFactory, model_folder: Folder) -> ExportResult:
    """llama in float32 without the plugin."""
    from tests.clada_export.conftest import _kept_trace

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clada_export.pipeline.trace", _kept_trace)
        return export(model_folder("llama"), tmp_path_factory.mktemp("trt") / "out", NO_PLUGIN)


def _check(result: ExportResult, plugins: int) -> None:
    assert result.verification is not None and result.verification.passed
    names = [check.name for check in result.verification.checks]
    assert sum("ONNX graph, dense parity" in name for name in names) == 5
    assert sum("ONNX graph, sparse parity" in name for name in names) == 2
    assert any("engine, file model.engine" in name for name in names)
    manifest = read_manifest(result.path)
    assert manifest.engine is not None
    assert (manifest.target, manifest.engine["backend"]) == ("trt", "tensorrt_rtx")
    layers = json.loads((result.path / LAYERS_NAME).read_text())
    assert sum(layer["type"] == "PLUGIN_V3" for layer in layers) == plugins


# --- whole exports ---


def test_without_the_plugin(dense_export: ExportResult) -> None:
    _check(dense_export, plugins=0)
    manifest = dense_export.manifest
    assert manifest.engine is not None
    assert (manifest.library, manifest.engine["plugin"]) == (None, None)
    assert [profile["name"] for profile in manifest.engine["profiles"]] == ["decode", "prompt"]
    assert any("--no-plugin" in warning for warning in manifest.warnings)
    files = {path.name for path in dense_export.path.iterdir()}
    assert {"model.onnx", "model.onnx.data", "model.engine", LAYERS_NAME, "verify"} <= files
    assert not any(name.startswith("inlined") or name.endswith(".so") for name in files)
    card = (dense_export.path / "README.md").read_text()
    assert "tensorrt_rtx --loadEngine=model.engine" in card and "import tensorrt_rtx as trt" in card


@needs_no_gpu
def test_what_is_deferred_is_said(dense_export: ExportResult) -> None:
    deferred = dense_export.manifest.verification["deferred"]
    assert len(deferred) == 1 and deferred[0].startswith("engine numerics: deferred, no GPU here")
    assert deferred[0] in dense_export.manifest.warnings
    assert "TensorRT engine" in (dense_export.path / "report.html").read_text()
    for name in ("README.md", "report.html"):
        assert "engine numerics: deferred" in (dense_export.path / name).read_text(), name


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float16")])
def test_with_the_plugin(kind: str, dtype: str, plugin: Path, model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    result = export(model_folder(kind), tmp_path / "out", replace(OPTIONS, dtype=dtype))
    _check(result, plugins=2)
    assert result.manifest.engine is not None
    record = result.manifest.engine["plugin"]
    assert (record["name"], record["namespace"], record["layers"]) == ("SparseFFN", "com.clada", 2)
    assert (tmp_path / "out" / record["file"]).read_bytes() == plugin.read_bytes()
    assert {tensor.dtype for tensor in result.manifest.cache} == {dtype}
    load = next(spec for spec in result.manifest.inputs if spec.name == "load")
    assert load.dtype == "float32"
    assert b"SparseFFN" in (tmp_path / "out" / "model.engine").read_bytes()
    if dtype != "float32":
        assert any(f"stored and computed in {dtype}" in warning for warning in result.manifest.warnings)


def test_a_16_bit_graph_without_the_plugin(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    _check(export(model_folder("llama"), tmp_path / "out", replace(NO_PLUGIN, dtype="float16")), plugins=0)


def test_a_scale_of_attention_that_is_no_power_of_two(kept_traces: None, tmp_path: Path) -> None:
    """The exporter rounds its root: 8 ** -0.25 is 0.5946, and 0.59375 in bfloat16, which moves logits by 1e-2."""
    tiny_model("llama", head_dim=8).save_pretrained(tmp_path / "model")
    result = export(tmp_path / "model", tmp_path / "out", replace(NO_PLUGIN, dtype="bfloat16"))
    _check(result, plugins=0)
    assert result.verification is not None
    checks = [check for check in result.verification.checks if "dense parity, prompt" in check.name]
    assert len(checks) == 2 and all(check.numbers["max_abs"] < 1e-4 for check in checks)


def test_an_embedded_plugin_and_streamed_weights(plugin: Path, model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    sizes = []
    for embed in (False, True):
        settings = replace(SMALL, embed_plugin=embed, weight_streaming=True)
        result = export(model_folder("llama"), tmp_path / str(embed), replace(OPTIONS, tensorrt=settings, verify=False))
        assert result.manifest.engine is not None
        assert result.manifest.engine["plugin"]["embedded"] is embed
        sizes.append((tmp_path / str(embed) / "model.engine").stat().st_size)
    assert sizes[1] - sizes[0] >= plugin.stat().st_size


# --- refusals ---


def test_no_tensorrt(model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("clada_export.native.tensorrt.importlib.util.find_spec", lambda name: None)
    assert main_export([str(model_folder("llama")), "--target", "trt", "-o", str(tmp_path / "out")]) == 5
    assert "pip install 'clada-export[rtx]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_plugin_library(model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("CLADA_TRT_LIBRARY", str(tmp_path / "nothing.so"))
    assert main_export([str(model_folder("llama")), "--target", "trt", "-o", str(tmp_path / "out")]) == 5
    said = capsys.readouterr().err
    assert "nothing.so" in said and "--no-plugin" in said and "source" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "ort", "--max-batch", "2"], "need --target trt"),
        (["--target", "trt", "--max-batch", "0"], "--max-batch 0 is out of range: it must be at least 1 and at most 65536"),
        (["--target", "trt", "--compute-capability", "9.0"], "builds for 7.5"),
        (["--target", "trt", "--no-plugin", "--embed-plugin"], "exclude each other"),
        (["--target", "trt", "--timing-cache", "/does/not/exist/x"], "does not exist"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], said: str, model_folder: Folder, tmp_path: Path, capsys: Any) -> None:
    assert main_export([str(model_folder("llama")), *arguments, "-o", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_profile_longer_than_the_model(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max-past 512 leaves no place for a token after it: the model takes 512"):
        export(model_folder("llama"), tmp_path / "out", replace(NO_PLUGIN, tensorrt=replace(SMALL, plugin=False, max_past=512)))
    assert list(tmp_path.iterdir()) == []


def test_a_plugin_that_tensorrt_did_not_take(
    plugin: Path, model_folder: Folder, kept_traces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser falls back to the function in silence; the export does not."""
    built = target.build_engines

    def without(*arguments: Any) -> Any:
        made = built(*arguments)
        return replace(made, layers=tuple((name, "CAST") for name, _ in made.layers))

    monkeypatch.setattr(target, "build_engines", without)
    with pytest.raises(BackendError, match="made 0 plugin layers of 2"):
        export(model_folder("llama"), tmp_path / "out", OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_float16() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = 1e6
    with pytest.raises(UnsupportedModelError, match=r"weight: a weight of 1e\+06 does not fit float16"):
        round_all_weights(layer, "float16")


def test_a_copy_in_16_bits() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    buffers = {name: (value.dtype, value.clone()) for name, value in model.named_buffers()}
    copy = in_dtype(model, "bfloat16")
    assert {weight.dtype for weight in copy.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert copy.get_output_embeddings().weight is copy.get_input_embeddings().weight  # type: ignore[operator]
    for name, value in copy.named_buffers():
        assert value.dtype == buffers[name][0]
        assert torch.equal(value, buffers[name][1])


# --- what is left for a GPU ---


def _by_onnx_runtime(folder: Path) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return lambda profile, feeds: dict(zip(names, session.run(names, feeds), strict=True))


def test_saved_runs_are_what_the_graph_computes(dense_export: ExportResult) -> None:
    checks = check_saved(dense_export.path, _by_onnx_runtime(dense_export.path))
    assert [check.name for check in checks] == ["prompt, dense", "decode, dense", "decode, sparse"]
    assert all(check.passed for check in checks)
    assert checks[0].numbers["max_abs"] < 1e-4
    assert [case["profile"] for case in json.loads((dense_export.path / CASES).read_text())] == [1, 0, 0]


@pytest.mark.parametrize(("output", "failing"), [("logits", 3), ("active_neurons", 1), ("entropy", 3), ("log_sum_exp", 3)])
def test_a_wrong_engine_is_found(dense_export: ExportResult, output: str, failing: int) -> None:
    infer = _by_onnx_runtime(dense_export.path)

    def wrong(profile: int, feeds: dict[str, Any]) -> dict[str, Any]:
        found = infer(profile, feeds)
        found[output] = found[output] * 2
        return found

    checks = check_saved(dense_export.path, wrong)
    assert sum(not check.passed for check in checks) == failing


def test_an_engine_of_nan_is_found(dense_export: ExportResult) -> None:
    infer = _by_onnx_runtime(dense_export.path)

    def wrong(profile: int, feeds: dict[str, Any]) -> dict[str, Any]:
        found = infer(profile, feeds)
        return {**found, "logits": np.full_like(found["logits"], np.nan)}

    assert not any(check.passed for check in check_saved(dense_export.path, wrong))


def test_polygraphy_reads_the_saved_runs(dense_export: ExportResult) -> None:
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    feeds = load_json(str(dense_export.path / INPUTS))
    assert {spec.name for spec in dense_export.manifest.inputs} == set(feeds[0])
    results = RunResults.load(str(dense_export.path / OUTPUTS))
    assert [name for name, _ in results] == ["eager PyTorch"]


def test_polygraphy_takes_the_tensorrt_that_built_the_engine() -> None:
    """In a process that has used Polygraphy for something else before."""
    code = (
        "from clada_export.verify.saved import _polygraphy; _polygraphy();"
        "from clada_export.native.tensorrt import load_backend; from clada_export.targets.trt.target import polygraphy_runner;"
        "runner = polygraphy_runner(load_backend('tensorrt_rtx'));"
        "import polygraphy.backend.trt.runner as module; print(module.trt.ICudaEngine.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tensorrt_rtx_bindings")


@needs_no_gpu
def test_verify_says_what_is_missing(dense_export: ExportResult, model_folder: Folder, capsys: Any) -> None:
    for source in ([], ["--source", str(model_folder("llama"))]):
        assert main(["verify", str(dense_export.path), *source]) == 5
        captured = capsys.readouterr()
        assert "runs on an NVIDIA GPU, and" in captured.err and captured.out == ""
    assert main(["run", str(dense_export.path), "--prompt", "x"]) == 5


def test_verify_finishes_where_an_engine_runs(dense_export: ExportResult, monkeypatch: pytest.MonkeyPatch) -> None:
    class Runner:
        def __enter__(self) -> Runner:
            return self

        def __exit__(self, *arguments: object) -> None:
            pass

        def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
            return _by_onnx_runtime(dense_export.path)(0, feeds)

    monkeypatch.setattr(target, "_runner", lambda folder, manifest, profile: Runner())
    found = verify_folder(dense_export.path)
    assert found.passed and not found.deferred
    assert [check.name for check in found.checks][-3:] == [
        "engine on the GPU, prompt, dense",
        "engine on the GPU, decode, dense",
        "engine on the GPU, decode, sparse",
    ]


def test_verify_with_the_source_runs_all_checks_on_the_engine(
    dense_export: ExportResult, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is stood in for by the graph; its numbers are the same."""
    with target.graph_engine(dense_export.path, dense_export.manifest) as engine:
        engine.max_batch = 1
        monkeypatch.setattr(target, "load_engine", lambda folder: engine)
        found = verify_folder(dense_export.path, str(model_folder("llama")))
    assert found.passed
    names = [check.name for check in found.checks]
    assert not any("batch 2" in name for name in names) and "dense parity, greedy tokens" in names


def test_a_changed_engine_file(dense_export: ExportResult, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dense_export.path, copy)
    (copy / "model.engine").write_bytes(b"")
    manifest = read_manifest(dense_export.path)
    assert not all(check.passed for check in engine_checks(copy, manifest))
    with pytest.raises(UsageError, match=r"model\.engine: has 0 bytes"):
        load_engine(copy)


def test_saved_runs_that_are_damaged_or_missing(dense_export: ExportResult, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dense_export.path, copy)
    (copy / INPUTS).write_text("{")
    with pytest.raises(UsageError, match="can't be read"):
        check_saved(copy, lambda profile, feeds: {})
    (copy / CASES).unlink()
    with pytest.raises(UsageError, match="--no-verify"):
        check_saved(copy, lambda profile, feeds: {})


def test_a_graph_that_computes_something_else_fails(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.clada_export.conftest import _kept_trace

    other = TorchDecoder(tiny_model("llama", 1))
    monkeypatch.setattr("clada_export.pipeline.trace", lambda decoder, fusions: _kept_trace(other, fusions=fusions))
    with pytest.raises(VerificationError, match="ONNX graph, dense parity, prompt"):
        export(model_folder("llama"), tmp_path / "out", NO_PLUGIN)
    assert list(tmp_path.iterdir()) == []


def test_the_report_on_the_command_line(dense_export: ExportResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(dense_export.path)]) == 0
    shown = capsys.readouterr().out
    assert "engine    model.engine for compute capability 8.9" in shown
    assert "profile   decode: batch 1..2, sequence 1..1, past 0..511" in shown


def test_the_onnx_file_serves_both_ways(dense_export: ExportResult) -> None:
    """The op's nodes carry what TensorRT's parser looks for, and the file keeps their function."""
    graph = ir.load(dense_export.path / "model.onnx")
    nodes = [node for node in graph.graph if node.domain == "com.clada"]
    assert len(nodes) == 2 and len(graph.functions) == 1
    assert {node.attributes["plugin_namespace"].value for node in nodes} == {"com.clada"}
