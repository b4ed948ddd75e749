"""The recorded cost of the graph passes, and the page that shows it."""

from __future__ import annotations

import json

from benchmarks import markers, passes


def test_the_recorded_page_is_what_the_recorded_results_give() -> None:
    page = passes.PAGE.read_text(encoding="utf-8")
    assert page == markers.fill(page, passes.section(json.loads(passes.RESULTS.read_text(encoding="utf-8"))))


def test_recorded_results_reach_what_is_promised() -> None:
    result = json.loads(passes.RESULTS.read_text(encoding="utf-8"))
    assert [row["layers"] for row in result["rows"]][: len(passes.LAYERS)] == list(passes.LAYERS)
    # Linear, but for what varies from run to run.
    assert result["slope"] < 1.15
    (real,) = (row for row in result["rows"] if row["name"] == "smollm2")
    assert real["layers"] == 30 and real["search_s"] + real["rewrite_s"] < 2.0
