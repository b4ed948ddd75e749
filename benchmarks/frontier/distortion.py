"""The error of each way to store a scale, on normal weights: what rotated weights are like, and a matter of seconds.

python -m benchmarks.frontier.distortion     # benchmarks/results/distortion.json

KL goes with the square of the error, and a bit more halves the error. So `worth` says how many bits a format is ahead of
rounding to nearest with a float16 scale and offset for each 32 weights, at the same error.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT
from benchmarks.frontier.families import BASE, ROUND
from benchmarks.frontier.grids import Grid
from benchmarks.frontier.llama import LlamaFormat

RESULT = ROOT / "benchmarks" / "results" / "distortion.json"
ROWS, ROW = 512, 1536


def grids() -> list[Grid]:
    """Symmetric or with offset, both ways to store and to find scales, at several blocks and bits."""
    found = []
    for bits in (4, 5, 6):
        for offset in (False, True):
            found += [Grid(bits, offset=offset), Grid(bits, offset=offset, search=True)]
            found += [Grid(bits, block=block, offset=offset, scales="super", search=True) for block in (16, 32, 64, 128)]
    return found


def plane_grids() -> list[Grid]:
    """Two planes: what the high plane alone is."""
    bases = (ROUND, BASE, replace(BASE, offset=False))
    return [replace(base, low=low, fit_high=fit) for base in bases for low in (1, 2, 4) for fit in (False, True)]


def measure(rows: int = ROWS, row: int = ROW) -> dict[str, Any]:
    """Relative errors of weights [rows, row]."""
    weights = torch.randn(rows, row, generator=torch.Generator().manual_seed(0))

    def error(found: torch.Tensor) -> float:
        return float((found - weights).norm() / weights.norm())

    one: list[dict[str, Any]] = []
    for name in ("Q4_0", "Q4_K", "Q5_K", "Q6_K"):
        form = LlamaFormat(name)
        one.append({"name": name, "bits": form.bits(row), "error": error(form(weights))})
    for grid in grids():
        scale, low = grid.levels_of(weights)
        found = error(grid.decode(grid.nearest(weights, scale, low), scale, low))
        one.append({"name": grid.name, "bits": grid.bits + grid.overhead(row), "error": found})
    base = next(item for item in one if item["name"] == ROUND.name)
    for item in one:
        item["worth"] = math.log2(base["error"] / item["error"]) - (item["bits"] - base["bits"])
    two = []
    for grid in plane_grids():
        scale, low = grid.levels_of(weights)
        codes = grid.nearest(weights, scale, low)
        errors = {"high": error(grid.decode_high(codes, scale, low)), "error": error(grid.decode(codes, scale, low))}
        two.append({"name": grid.name, "bits": grid.bits + grid.overhead(row), **errors})
    return {"benchmark": "distortion", "format": 1, "rows": rows, "row": row, "one": one, "two": two}


def main(path: Path = RESULT) -> int:
    """Measure, and write the result."""
    path.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
