"""The GPU script's own part: steps that fail, hang or are missing are recorded, and do not stop the others."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_suite import Suite


def test_steps_are_recorded(tmp_path: Path) -> None:
    suite = Suite(tmp_path, None, time.monotonic() + 60, emulated=True)
    assert suite.run("good", [sys.executable, "-c", "print('==== 3 passed, 1 skipped in 0.20s ====')"], 20)
    assert not suite.run("bad", [sys.executable, "-c", "print('ERROR SUMMARY: 2 errors'); raise SystemExit(9)"], 20)
    assert not suite.run("hangs", [sys.executable, "-c", "import time; time.sleep(30)"], 0.5)
    assert not suite.run("missing", ["no-such-program"], 20)
    suite.deadline = time.monotonic() + 5
    assert not suite.run("late", [sys.executable, "-c", "print(1)"], 20)
    found = {name: (step["passed"], step.get("exit_code"), step["summary"]) for name, step in suite.steps.items()}
    assert found["good"] == (True, 0, "3 passed, 1 skipped in 0.20s")
    assert found["bad"] == (False, 9, "ERROR SUMMARY: 2 errors")
    assert found["hangs"][:2] == (False, 124)
    assert found["missing"][1] == 127 and "no-such-program" in found["missing"][2]
    assert found["late"] == (False, None, "not run: no time was left")
    assert "passed" in (tmp_path / "good.log").read_text()


def test_steps_see_this_build(tmp_path: Path) -> None:
    for name in gpu_suite.HEADERS:
        (tmp_path / name).mkdir()
    environment = Suite(tmp_path, tmp_path, 0.0).environment()
    for name in ("CLADA_TRT_LIBRARY", "CLADA_CUDA_KERNELS", "CLADA_PLUGIN_CONFORMANCE"):
        assert environment[name].startswith(str(gpu_suite.ROOT / "build" / "gpu"))
    assert environment["TENSORRT_INCLUDE_DIR"] == str(tmp_path / "tensorrt")
    assert "CLADA_CUDA_KERNELS" not in Suite(tmp_path, None, 0.0, emulated=True).environment()


def test_a_build_that_fails_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "build_steps", lambda suite: suite.run("configure", ["false"], 20))
    assert gpu_suite.main(["run", "--emulated", "--out", str(tmp_path / "out")]) == 1
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert list(found["steps"]) == ["configure"] and not found["steps"]["configure"]["passed"]
    assert found["about"]["emulated"] and found["about"]["commit"] is not None
