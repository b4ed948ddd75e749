"""The page about GPUs is what its results say."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu_page import page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_the_results_say() -> None:
    results = ROOT / "benchmarks" / "results" / "gpu-h100.json"
    found = json.loads(results.read_text(encoding="utf-8"))
    assert all(step["passed"] for step in found["steps"].values())
    assert (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8") == page(found, results.name), "run benchmarks.gpu_page"
