"""Engines with quantised weights, end to end on tiny random models: made, verified, verified again, changed, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from clada_export.artifact.manifest import file_record, read_manifest, write_manifest
from clada_export.calibration.budget import BudgetUnmetError
from clada_export.cli import main
from clada_export.errors import UsageError
from clada_export.export_options import ExportOptions
from clada_export.methods import PolicySettings
from clada_export.pipeline import ExportResult, export, verify_folder
from clada_export.runtime import load_engine
from tests.tiny_models import ffn_names

Folder = Callable[[str], Path]
OPTIONS = ExportOptions(sparsity=0.5, calibration_context=48, load_response=False, calibration_cache=None, weights="int5")
BUDGET = replace(OPTIONS, sparsity=None, budget="kl=0.2")


@pytest.fixture(scope="module")
def shelf() -> list[ExportResult]:
    """What was made for all tests of this file."""
    return []


@pytest.fixture
def made(
    shelf: list[ExportResult], model_folder: Folder, kept_traces: None, tmp_path_factory: pytest.TempPathFactory
) -> ExportResult:
    """An engine of the tiny Llama with 5 bits."""
    if not shelf:
        shelf.append(export(model_folder("llama"), tmp_path_factory.mktemp("quantised") / "out", OPTIONS))
    return shelf[0]


def nodes(folder: Path, op_type: str) -> list[ir.Node]:
    return [node for node in ir.load(folder / "model.onnx").graph if node.op_type == op_type]


def test_an_engine_says_what_its_weights_are(made: ExportResult, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(made.path)
    weights = manifest.weights
    assert weights["form"] == "int5" and made.plan.source["weights"]["name"] == "int5"
    assert {kind: value["bits"] for kind, value in weights.items() if kind != "form"} == {
        "ffn": 5, "attention": 6, "head": 6, "embedding": 8,
    }  # fmt: skip
    assert [node.attributes["weight_format"].value for node in nodes(made.path, "SparseFFN")] == ["int5", "int5"]
    assert not nodes(made.path, "MatMul") or all(node.inputs[1].const_value is None for node in nodes(made.path, "MatMul"))
    assert (made.path / "model.onnx.data").stat().st_size < 1.3 * sum(
        weights[kind]["bytes"] for kind in weights if kind != "form"
    )
    assert "all weights in\nint5)" in (made.path / "README.md").read_text()
    assert main(["inspect", str(made.path)]) == 0
    shown = capsys.readouterr().out
    assert "weights int5" in shown and "ffn 5 bits" in shown


def test_it_was_verified_in_two_steps(made: ExportResult) -> None:
    assert made.verification is not None and made.verification.passed
    checks = {check.name: check for check in made.verification.checks}
    assert checks["quantised matrices"].numbers["missing"] == 0
    # Parity is with the quantised model, drift from the model as it was: rounding to 5 bits is in the drift alone.
    parity = checks["dense parity, prompt (random, batch 1)"].numbers
    assert parity["kl"] < 1e-3 < checks["drift"].numbers["kl"]
    assert 0.3 < checks["drift"].numbers["sparsity"] < 0.7


def test_it_runs_and_is_verified_again(made: ExportResult, model_folder: Folder) -> None:
    tokens = load_engine(made.path).generate([[5, 6, 7]], 8, eos_token_id=[]).tokens[0]
    assert len(tokens) == 8
    again = verify_folder(made.path, str(model_folder("llama")))
    assert again.passed
    assert "missing" not in {check.name: check for check in again.checks}["quantised matrices"].numbers


def changed(made: ExportResult, folder: Path, change: Callable[[np.ndarray], None], name: str) -> Path:
    """The engine with the bytes of a constant changed, and a manifest that fits them."""
    shutil.copytree(made.path, folder)
    value = ir.load(folder / "model.onnx").graph.initializers[name].const_value
    assert isinstance(value, ir.ExternalTensor) and value.offset is not None
    array = np.memmap(folder / "model.onnx.data", np.uint8, "r+", value.offset, tuple(value.shape.numpy()))
    change(array)
    array.flush()
    manifest = read_manifest(made.path)
    files = {**manifest.files, "model.onnx.data": file_record(folder / "model.onnx.data")}
    write_manifest(folder, manifest.with_files(files))
    return folder


def test_an_engine_with_other_weights_fails(made: ExportResult, model_folder: Folder, tmp_path: Path) -> None:
    name = next(str(node.inputs[1].name) for node in nodes(made.path, "QuantMatMul"))

    def turn(array: np.ndarray) -> None:
        array[:] = array[:, ::-1].copy()  # blocks of columns in another order

    folder = changed(made, tmp_path / "turned", turn, name)
    found = verify_folder(folder, str(model_folder("llama")))
    assert not found.passed
    assert any(check.name == "quantised matrices" and not check.passed for check in found.checks)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("phi3", "int4"), ("gpt2", "int6"), ("gemma3_text", "int8"), pytest.param("qwen2", "int4", marks=pytest.mark.long)],
)
def test_other_forms_of_ffns_and_weights(
    kind: str, weights: str, model_folder: Folder, kept_traces: None, tmp_path: Path
) -> None:
    result = export(model_folder(kind), tmp_path / "out", replace(OPTIONS, weights=weights))
    assert result.verification is not None and result.verification.passed
    assert [layer.name for layer in result.plan.layers] == list(ffn_names(kind))
    assert result.manifest.weights["ffn"]["bits"] == int(weights[3:])


def test_a_budget_counts_rounding_and_skipping(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    result = export(model_folder("llama"), tmp_path / "out", replace(BUDGET, verify=False))
    (dense,) = result.plan.calibration.details["weights"]
    drift = result.plan.calibration.drift
    assert drift is not None
    assert 0 < dense["kl"] < drift["kl"] <= 0.2 and result.plan.expected_sparsity > 0


def test_weights_that_cost_more_than_the_budget_skip_nothing_and_warn(
    model_folder: Folder, kept_traces: None, tmp_path: Path
) -> None:
    result = export(model_folder("llama"), tmp_path / "out", replace(BUDGET, weights="int4", budget="kl=0.0001"))
    assert result.plan.expected_sparsity == 0 and result.verification is not None and result.verification.passed
    assert any(
        "weights int4 alone cost kl=" in warning and "budget is kl=0.0001" in warning for warning in result.manifest.warnings
    )


def test_auto_takes_the_form_that_reads_the_least(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    options = replace(BUDGET, weights="auto", verify=False)
    result = export(model_folder("llama"), tmp_path / "out", options)
    rows = result.plan.calibration.details["weights"]
    kept = [row for row in rows if "bytes" in row]
    assert rows[0]["weights"] == "int4" and kept
    assert result.manifest.weights["form"] == min(kept, key=lambda row: row["bytes"])["weights"]
    with pytest.raises(BudgetUnmetError, match=r"no form of the weights keeps the budget kl=1e-06: the nearest, int8"):
        export(model_folder("llama"), tmp_path / "none", replace(options, budget="kl=0.000001"))


def test_a_plan_is_of_one_form(made: ExportResult, model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    made.plan.save(plan)
    given = replace(OPTIONS, plan=plan, weights=None, sparsity=None)
    again = export(model_folder("llama"), tmp_path / "again", given)
    assert again.manifest.weights["form"] == "int5" and again.verification is not None and again.verification.passed
    assert (tmp_path / "again" / "model.onnx.data").read_bytes() == (made.path / "model.onnx.data").read_bytes()
    with pytest.raises(UsageError, match=r"plan.json: the plan was made with weights int5, and --weights asks for int8"):
        export(model_folder("llama"), tmp_path / "other", replace(given, weights="int8"))
    with pytest.raises(UsageError, match=r"quantised with the text .* windows of 48 tokens.* give the same"):
        export(model_folder("llama"), tmp_path / "text", replace(given, calibration_context=40))
    value = json.loads(plan.read_text())
    value["source"]["weights"]["ffn"] = 3
    plan.write_text(json.dumps(value))
    with pytest.raises(UsageError, match=r"source: weights: ffn has 3 bits; allowed: 4, 5, 6, 8"):
        export(model_folder("llama"), tmp_path / "bits", given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "int3"}, "unknown weights 'int3'; known: float32, .*int4, auto"),
        ({"weights": "int8", "dtype": "bfloat16"}, "--weights int8 and --dtype bfloat16 contradict"),
        ({"weights": "float16", "dtype": "bfloat16"}, "--weights float16 and --dtype bfloat16 contradict"),
        ({"target": "trt"}, "--weights int5: there is no TensorRT plugin for quantised weights; use --target ort"),
        ({"policy": "auto"}, "--weights int5 and --policy auto exclude each other"),
        ({"policy": "griffin"}, "score 'exact' only, which policy 'griffin' does not; use .*clada"),
        ({"policy": "dejavu"}, "score 'exact' only, which policy 'dejavu' does not"),
        ({"settings": PolicySettings(score="shadow")}, "score 'exact' only, not 'shadow'"),
        ({"prune": "wanda=0.5"}, "--weights int5 and --prune exclude each other"),
        ({"calibration_workers": 2}, "leave --calibration-workers out"),
    ],
)
def test_what_does_not_go_together_is_said_before_any_work(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        export("no such model", tmp_path / "out", replace(OPTIONS, **changes))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_old_name_of_types_stays(capsys: pytest.CaptureFixture[str]) -> None:
    assert replace(OPTIONS, weights=None, dtype="bfloat16").settled().weights == "bfloat16"
    assert replace(OPTIONS, weights="bfloat16").settled().dtype == "bfloat16"
    assert main(["export", "no such model", "--target", "ort", "--weights", "int8", "--dtype", "float32"]) == 2
    assert "--weights int8 and --dtype float32 contradict each other" in capsys.readouterr().err
