"""What exports cost: the watching, the record, and the page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from benchmarks import export_cost, export_page
from benchmarks.export_cost import CELLS, Cell, MissingError, Settings, run
from benchmarks.export_watch import Watched, watch
from benchmarks.markers import BEGIN, END
from benchmarks.random_llama import LlamaShape, write_llama
from clada_export.files.capacity import Disk

MB = 1 << 20
TINY = LlamaShape(hidden=64, intermediate=96, layers=2, vocabulary=256, heads=4, kv_heads=2)
_CHILD = """
import sys, time
def tick(stage, seconds): print(f"[✓] {stage:<18} {seconds:7.1f} s  a note", file=sys.stderr, flush=True)
time.sleep(0.3); tick("source", 0.1)
big = bytearray(200 << 20); big[:: 4096] = b"1" * len(big[:: 4096]); time.sleep(0.2); del big
tick("rewrite and write", 0.2)
print("calibrate 3/11 passes", file=sys.stderr, flush=True); time.sleep(0.2)
tick("verify", 0.2)
print('{"answer": 1}')
"""


def watched(child: str = _CHILD) -> Watched:
    return watch([sys.executable, "-c", child])


def test_each_stage_has_its_own_peak() -> None:
    found = watched()
    assert found.code == 0 and found.printed.strip() == '{"answer": 1}'
    stages = {stage.name: stage for stage in found.stages}
    assert list(stages) == ["start", "source", "rewrite and write", "verify", "finish"]
    large, after = stages["rewrite and write"], stages["verify"]
    assert large.own > 200 * MB and large.peak >= large.own
    # It was given back, and the record of the peak began anew.
    assert after.peak < 100 * MB and stages["source"].peak < 100 * MB
    assert found.peak == large.peak and found.own == large.own


def test_the_seconds_are_all_of_the_process() -> None:
    found = watched()
    assert sum(stage.seconds for stage in found.stages) == pytest.approx(found.seconds, abs=0.15)
    assert found.stages[0].seconds >= 0.15  # Python's start, and what the stage does not count


def test_a_process_that_fails() -> None:
    found = watched("import sys; print('error: no such file', file=sys.stderr); sys.exit(2)")
    assert found.code == 2 and "no such file" in found.said
    assert [stage.name for stage in found.stages] == ["start", "finish"]


def test_a_random_llama_is_a_checkpoint(tmp_path: Path) -> None:
    folder = write_llama(TINY, tmp_path / "model")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == TINY.layers + 1
    elements = 0
    for file in files:
        with safe_open(file, framework="pt") as stream:
            elements += sum(stream.get_tensor(name).numel() for name in stream.offset_keys())
    assert elements == TINY.parameters
    time = files[0].stat().st_mtime_ns
    assert write_llama(TINY, folder) == folder and files[0].stat().st_mtime_ns == time


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells that need nothing, and a measurement that runs nothing."""
    asked: list[str] = []

    def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
        if cell.name == "absent":
            raise MissingError("nothing is there")
        asked.append(cell.name)
        return recorded(cell.name, cell.layers)

    monkeypatch.setattr(export_cost, "measure", measure)
    monkeypatch.setattr(export_cost, "describe", lambda threads: {**MACHINE, "commit": "1"})
    depth = [Cell(f"depth-{n}", f"{n} layers", lambda settings: Path(), layers=n) for n in (2, 4)]
    monkeypatch.setattr(export_cost, "CELLS", {cell.name: cell for cell in (*depth, replace(depth[0], name="absent"))})
    return asked


MACHINE: dict[str, Any] = {
    "machine": {"cpu": "a CPU", "cores": 2, "threads": 2, "memory_gib": 24},
    "versions": {"torch": "2"},
}


def recorded(name: str, layers: int | None) -> dict[str, Any]:
    weights = 1.0 + (layers or 0)
    return {
        "name": name,
        "title": f"model {name}",
        "layers": layers,
        "code": 0,
        "wanted": {"seconds": 30.0, "bytes": 2e9},
        "seconds": 10.0 * weights,
        "peak_bytes": (weights + 0.5) * 1e9,
        "own_bytes": 0.5e9,
        "output_bytes": weights * 1e9,
        "busy_before": 0.1,
        "stages": [{"name": "verify", "seconds": 10.0 * weights, "peak": (weights + 0.5) * 1e9, "own": 5e8, "mapped": 0}],
        "predicted": {
            "size": {"parameters": weights * 0.25e9},
            "price": {
                "seconds": 20.0,
                "memory": 4e9,
                "needed": 1e9,
                "output": weights * 1e9,
                "stages": [{"stage": "verify", "seconds": 12.0, "memory": 1e9}],
            },
        },
        "commit": "1",
        **MACHINE,
    }


def _run(tmp_path: Path, *names: str, again: bool = False) -> tuple[bool, list[str]]:
    said: list[str] = []
    good = run(names, Settings(tmp_path / "work"), tmp_path / "result.json", again, said.append)
    return good, said


def test_a_run_goes_on_where_it_was(tmp_path: Path, cells: list[str]) -> None:
    assert _run(tmp_path, "depth-2")[0]
    assert _run(tmp_path, "depth-2", "depth-4")[0] and cells == ["depth-2", "depth-4"]
    assert _run(tmp_path, "depth-4", again=True)[0] and cells == ["depth-2", "depth-4", "depth-4"]
    assert list(json.loads((tmp_path / "result.json").read_text())["cells"]) == ["depth-2", "depth-4"]


def test_what_is_missing_is_said_and_recorded(tmp_path: Path, cells: list[str]) -> None:
    good, said = _run(tmp_path, "absent", "depth-2")
    assert not good and any("not measured: nothing is there" in line for line in said)
    known = json.loads((tmp_path / "result.json").read_text())["cells"]
    assert known["absent"]["missing"] == "nothing is there" and "seconds" in known["depth-2"]


def test_missing_parts_of_the_real_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingError, match="--qwen"):
        CELLS["qwen"].model(Settings(tmp_path))
    monkeypatch.setattr(export_cost, "disk", lambda place: Disk(1, 10**9))
    with pytest.raises(MissingError, match="GB of disk are needed"):
        CELLS["7b-8"].model(Settings(tmp_path))


def test_the_page(tmp_path: Path) -> None:
    result = {
        "cells": {
            "depth-2": recorded("depth-2", 2),
            "depth-4": recorded("depth-4", 4),
            "absent": {"name": "absent", "title": "a model", "missing": "nothing is there"},
            "failed": {**recorded("failed", None), "code": 2, "reason": "error: no"},
        }
    }
    page = export_page.current(result, f"# Title\n\n{BEGIN}\n\n{END}\n")
    assert "| model depth-2 | 30 s (30 s: reached) | 3.50 GB (2.0 GB: **missed**) | 0.50 GB | 3.00 GB |" in page
    assert "- a model: nothing is there" in page and "exit code 2: error: no" in page
    assert "| peak memory, GB | 1.50 | 1.000 | 0.00 |" in page
    assert "takes 1.00 GB more at the peak (wanted: at most 1.3: reached) and 0.00 GB more of memory" in page
    assert "| depth-4 | 20, 50 s | 2.50 |" in page
    assert "| depth-4 | 12, 50 |" in page
    assert "No results are recorded yet." in export_page.current({"cells": {}}, f"{BEGIN}\n{END}")


def test_the_picture(tmp_path: Path) -> None:
    assert not export_page.draw({"cells": {}}, tmp_path / "no.svg")
    result = {"cells": {"depth-2": recorded("depth-2", 2)}}
    for name in ("one.svg", "two.svg"):
        assert export_page.draw(result, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


@pytest.mark.long
def test_a_real_export_is_measured(tmp_path: Path) -> None:
    cell = Cell("tiny", "tiny", lambda settings: write_llama(TINY, settings.work / "model"), ("--sparsity", "0.5"), layers=2)
    record = export_cost.measure(cell, Settings(tmp_path))
    assert record["code"] == 0, record["reason"]
    names = [stage["name"] for stage in record["stages"]]
    assert names == ["start", "source", "calibrate", "trace", "rewrite and write", "verify", "finish"]
    assert all(stage["peak"] > 50 * MB for stage in record["stages"][1:])
    assert record["predicted"]["size"]["parameters"] == TINY.parameters
    assert record["output_bytes"] > TINY.parameters * 4
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]
