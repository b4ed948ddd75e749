"""`report.json` and `report.html` of an export folder.

The HTML page is one file without scripts: its charts are inline SVG, and it asks nothing of the network. What it shows comes
from models and plans of strangers, so everything is escaped (`clada_export.artifact.report_page`). Nothing here depends on the
clock or the machine but what was timed in a calibration, so the same export gives the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clada_export.artifact.report_page import page

REPORT_JSON, REPORT_HTML = "report.json", "report.html"


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json` and `report.html`.

    Args:
        folder: an existing folder.
        report: `model` (str), `plan`, `verification`, `rewrite` (the `to_dict()` of `SparsityPlan`, `Verification` and
            `RewriteReport`), `calibration` (dict), `engine` (as in the manifest), `warnings` (list of str), and
            where wanted `timings` (seconds by stage). What is missing or empty is left out of the page.
    """
    text = json.dumps(_finite(report), indent=2, allow_nan=False)
    (folder / REPORT_JSON).write_text(text + "\n", encoding="utf-8")
    # A name from a file system may hold bytes that are no UTF-8.
    (folder / REPORT_HTML).write_text(page(report), encoding="utf-8", errors="backslashreplace")


def _finite(value: Any) -> Any:
    """The value with numbers that JSON does not have as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
