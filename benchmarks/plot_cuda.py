"""Draw what `ffn_cuda.py` measured: time against active neurons for one row, and against the batch.

python benchmarks/plot_cuda.py benchmarks/results/gpu.json docs/ffn-cuda.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt


def _pick(results: list[dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    """The largest layer of that type, or of any."""
    chosen = [item for item in results if item["dtype"] == dtype] or results
    size = max(chosen, key=lambda item: int(item["d"]) * int(item["f"]))["size"]
    return [item for item in chosen if item["size"] == size and item["dtype"] == chosen[0]["dtype"]]


def _time(variants: dict[str, Any], name: str) -> float:
    return float(variants[name]["microseconds"]["median"])


def draw(found: dict[str, Any], target: Path) -> None:
    """Write the picture."""
    items = sorted(_pick(found["results"], "float16"), key=lambda item: int(item["rows"]))
    first = items[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    variants = first["variants"]
    dense = min(_time(variants, "dense"), _time(variants, "dense_split"))
    for score in ("external", "shadow", "gate", "exact"):
        points = [(variants[name]["active"], _time(variants, name)) for name in variants if name.startswith(f"{score} ")]
        if points:
            left.plot(*zip(*sorted(points), strict=True), marker="o", label=f"score {score}")
    left.plot([1.0], [_time(variants, "load=inf")], "s", color="black", label="load = +inf")
    left.axhline(dense, color="grey", linestyle="--", label="dense, cuBLAS")
    left.set(xlabel="active neurons", ylabel="microseconds", title=f"one row, d {first['d']}, f {first['f']}, {first['dtype']}")
    decode = [item for item in items if item["rows"] <= 16]
    rows = [item["rows"] for item in decode]
    names = [name for name in decode[-1]["variants"] if name.startswith("external ") or name == "load=inf"]
    for name in names:
        right.plot(
            rows, [_time(item["variants"], name) for item in decode], marker="o", label=name.replace("external ", "active ")
        )
    best = [min(_time(item["variants"], "dense"), _time(item["variants"], "dense_split")) for item in decode]
    right.plot(rows, best, color="grey", linestyle="--", label="dense, cuBLAS")
    right.set(xlabel="rows (each with its own neurons)", ylabel="microseconds", title="batch")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.suptitle(str(found["about"]["device"]))
    figure.savefig(target, metadata={"Date": None})


def main() -> int:
    source, target = map(Path, sys.argv[1:3])
    found = json.loads(source.read_text(encoding="utf-8"))
    draw(found.get("ffn_cuda", found), target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
