"""The page of the load experiment, and the cost of the load's outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import load_outputs, load_page, markers


def arm(name: str, group: str, low: float, high: float) -> dict[str, Any]:
    return {
        "name": name,
        "group": group,
        "method": "threshold",
        "kl": 0.02,
        "difference": (low + high) / 2,
        "low": low,
        "high": high,
        "baseline_kl": 0.02,
        "top1": 0.9,
        "ppl_increase": 0.03,
        "sparsity": 0.5,
        "sparsity_difference": 0.0,
        "equal_sparsity": True,
        "dense_steps": 0.0,
        "document_kl": [0.01, 0.03],
    }


RESULT: dict[str, Any] = {
    "benchmark": "load",
    "model": {"name": "tiny", "weights_digest": "0"},
    "settings": {
        "score": "shadow",
        "sparsity": 0.5,
        "context": 256,
        "prompt_tokens": 64,
        "calibration_tokens": 4096,
        "calibration_text": "a text",
        "allocation": "fisher",
        "seed": 0,
    },
    "versions": {"torch": "2.9"},
    "texts": [
        {
            "name": "handbook",
            "documents": 2,
            "scored_tokens": 382,
            "arms": [
                arm("still", "baseline", 0.0, 0.0),
                arm("surprisal, slope 0.1", "M2 exp", -0.0008, -0.0002),
                arm("entropy, slope 0.1", "M2 exp", -0.001, 0.002),
            ],
        }
    ],
}


def test_a_result_fills_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{markers.BEGIN}\nold\n{markers.END}\n\nafter\n")
    monkeypatch.setattr(load_page, "RESULTS", tmp_path)
    monkeypatch.setattr(load_page, "PAGE", page)
    assert load_page.main(["--check"]) == 1
    assert load_page.main([]) == 0
    assert "No results are recorded yet." in page.read_text() and "old" not in page.read_text()
    (tmp_path / "load-tiny.json").write_text(json.dumps(RESULT))
    assert load_page.main(["--check"]) == 1
    assert load_page.main([]) == 0 and load_page.main(["--check"]) == 0
    text = page.read_text()
    assert text.startswith("# Title\n") and text.endswith("\n\nafter\n")
    assert "| surprisal, slope 0.1 |  | **-2.5% [-4.0, -1.0]** |" in text
    assert "| entropy, slope 0.1 |  | +2.5% [-5.0, +10.0] |" in text
    assert "lower than without a response, by an interval without 0, with: surprisal, slope 0.1 (M2 exp, -2.5%" in text
    assert "load-tiny.png" in text and (tmp_path / "load-tiny.png").is_file()


def test_the_recorded_page_is_what_the_recorded_results_give() -> None:
    assert load_page.PAGE.read_text() == load_page.current()


def test_what_the_outputs_cost_is_measured() -> None:
    found = load_outputs.measure(hidden_size=16, vocabulary=512, rounds=3, threads=1)
    assert set(found) == {"graph", "graph with load outputs", "meter from logits", "meter from load outputs"}
    assert all(value > 0 for value in found.values())
