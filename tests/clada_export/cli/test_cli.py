"""The command line: results on stdout, everything else on stderr, and the exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clada_export.cli import main, main_export
from clada_export.errors import UsageError
from clada_export.export_options import ExportOptions
from clada_export.pipeline import export
from clada_export.runtime import load_engine
from tests.tiny_models import tiny_model

Folder = Callable[[str], Path]
ARGUMENTS = ["--target", "ort", "--sparsity", "0.5", "--calibration-context", "48", "--no-load-response"]


@pytest.fixture(scope="module")
def engine_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Folder) -> Path:
    from tests.clada_export.conftest import _kept_trace

    out = tmp_path_factory.mktemp("engine") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clada_export.pipeline.trace", _kept_trace)
        export(model_folder("llama"), out, ExportOptions(sparsity=0.5, calibration_context=48, load_response=False))
    return out


@pytest.fixture
def copy(engine_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(engine_folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_export_prints_the_folder(
    model_folder: Folder, kept_traces: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main_export([str(model_folder("llama")), "-o", str(out), *ARGUMENTS]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    for stage in ("source", "calibrate", "trace", "rewrite and write", "verify"):
        assert f"[✓] {stage}" in captured.err
    assert "matched 2/2 FFNs" in captured.err
    assert "warning: calibrated on random tokens" in captured.err
    assert main_export([str(model_folder("llama")), "-o", str(out), *ARGUMENTS]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", str(model_folder("llama")), "-o", str(out), *ARGUMENTS, "--overwrite", "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["layers"] == 2
    assert result["verified"] is True


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["/does/not/exist", *ARGUMENTS], 2, "/does/not/exist"),
        (["MODEL", *ARGUMENTS, "--policy", "magic"], 2, "unknown policy"),
        (["MODEL", "--target", "tpu"], 2, "unknown target"),
        (["MODEL", "--target", "ort", "--budget", "ppl=0%"], 2, "above 0%"),
        (["MODEL", "--target", "ort", "--budget", "ppl=200%"], 2, "below 100%"),
        (["MODEL", *ARGUMENTS, "--dtype", "int3"], 2, "unknown dtype"),
        (["mixtral", *ARGUMENTS], 3, "mixture of experts"),
    ],
)
def test_exit_codes(
    arguments: list[str], code: int, said: str, model_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"MODEL": "llama", "mixtral": "mixtral"}
    given = [str(model_folder(names[word])) if word in names else word for word in arguments]
    assert main_export([*given, "-o", str(tmp_path / "out")]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_missing_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        for command in (["verify"], ["run", "--prompt", "x"], ["bench"], ["inspect"]):
            assert main([command[0], str(tmp_path / name), *command[1:]]) == 2
            assert str(tmp_path / name) in capsys.readouterr().err
    assert main_export([str(tmp_path / "empty"), "-o", str(tmp_path / "out"), *ARGUMENTS]) == 2
    assert not (tmp_path / "out").exists()


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["fly"], ["run"], ["run", "x", "--prompt", "y", "--load", "hard"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_verify(engine_folder: Path, model_folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(engine_folder), "--source", str(model_folder("llama"))]) == 0
    assert "[✓] dense parity, greedy tokens" in capsys.readouterr().out
    assert main(["verify", str(engine_folder), "--source", str(model_folder("llama")), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    assert main(["verify", str(engine_folder)]) == 2
    assert "--source" in capsys.readouterr().err


def test_a_failed_verification_exits_with_4(
    engine_folder: Path, model_folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tolerance of nothing: rounding alone fails it.
    monkeypatch.setattr("clada_export.verify.parity.DENSE_TOLERANCE", 0.0)
    assert main(["verify", str(engine_folder), "--source", str(model_folder("llama"))]) == 4
    captured = capsys.readouterr()
    assert "[✗] dense parity" in captured.out
    assert "verification failed" in captured.err


def test_bench_and_inspect(engine_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(engine_folder), "--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1"]
    assert main([*arguments, "--json"]) == 0
    speeds = json.loads(capsys.readouterr().out)
    assert [row["load"] for row in speeds] == ["dense", "auto"]
    assert speeds[0]["sparsity"] == 0.0 < speeds[1]["sparsity"] < 1.0
    for row in speeds:
        assert row["active_share"] == 1 - row["sparsity"]
        assert 0 < row["itl_p50_ms"] <= row["itl_p90_ms"] <= row["itl_p99_ms"]
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["itl_p50_ms"])
        assert row["weight_bytes"] is None and row["peak_memory"] > 1e6
    assert speeds[1]["ffn_bytes"] < speeds[0]["ffn_bytes"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    for column in ("tokens/s", "ITL", "TTFT", "active", "FFN", "weights", "memory"):
        assert column in captured.out and column in captured.err
    assert main([*arguments[:-2], "--new-tokens", "1"]) == 2
    assert main(["bench", str(engine_folder), "--prompt-tokens", "600"]) == 2
    capsys.readouterr()
    assert main(["inspect", str(engine_folder)]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in shown
    assert "silu*" in shown
    assert main(["inspect", str(engine_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "ort"


def test_run_without_a_tokenizer_says_so(engine_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(engine_folder), "--prompt", "hello"]) == 2
    assert "no tokenizer" in capsys.readouterr().err


# --- damaged engines ---


def test_an_edited_manifest(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = copy / "clada.json"
    manifest.write_text(manifest.read_text().replace('"ort"', '"trt"'))
    assert main(["inspect", str(copy)]) == 2
    assert "edited or damaged" in capsys.readouterr().err


def test_a_missing_library(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "libclada_ort.so").unlink()
    assert main(["run", str(copy), "--prompt", "x"]) == 5
    assert "libclada_ort.so" in capsys.readouterr().err


def test_a_library_for_another_version_of_the_op(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clada_export.native.library.OP_VERSION", 99)
    assert main(["bench", str(copy)]) == 5
    assert "99" in capsys.readouterr().err


def test_a_changed_model_file(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = copy / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    assert main(["inspect", str(copy)]) == 2
    assert "model.onnx.data" in capsys.readouterr().err


def test_zeroed_weights(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = copy / "model.onnx.data"
    before = data.stat()
    with data.open("r+b") as stream:
        stream.write(bytes(before.st_size // 2))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    arguments = [str(copy), "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1"]
    for command in (["bench", *arguments], ["run", str(copy), "--prompt", "x"], ["inspect", str(copy)], ["verify", str(copy)]):
        assert main(command) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "model.onnx.data: changed after the export" in captured.err
    with pytest.raises(UsageError, match=r"model\.onnx\.data: changed after the export"):
        load_engine(copy)
    # Those who know may go on.
    assert main(["bench", *arguments, "--no-check"]) == 0
    data.write_bytes(b"")
    capsys.readouterr()
    assert main(["bench", *arguments, "--no-check"]) == 2
    assert "has 0 bytes" in capsys.readouterr().err


def test_internal_errors_are_ours(
    engine_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path) -> None:
        raise RuntimeError("unexpected")

    monkeypatch.setattr("clada_export.artifact.manifest.read_manifest", broken)
    assert main(["inspect", str(engine_folder)]) == 1
    assert "internal error: RuntimeError: unexpected" in capsys.readouterr().err


def test_running_needs_neither_torch_nor_transformers(engine_folder: Path) -> None:
    code = (
        "import sys; from clada_export import load_engine; from pathlib import Path;"
        f"engine = load_engine(Path({str(engine_folder)!r}));"
        "print(len(engine.generate([[5, 6, 7]], 4, eos_token_id=[]).tokens[0]));"
        "assert not {'torch', 'transformers', 'onnx_ir'} & set(sys.modules), 'heavy import'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "4"), result.stderr


def test_the_fixture_model_is_the_one_on_disk(model_folder: Folder) -> None:
    from clada_export.decoder.digest import weights_digest
    from clada_export.source.load import load_source

    assert load_source(str(model_folder("llama"))).weights_digest == weights_digest(tiny_model("llama", 0))
