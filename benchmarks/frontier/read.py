"""What the page and the picture read out of a result: points, curves, and bits at equal KL."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.frontier.families import FAMILIES

GROUPS = {one.name: one.group for one in FAMILIES}
TARGETS = (0.02, 0.05)
"""KL at which formats are compared, nats a token."""


@dataclass(frozen=True)
class Point:
    """A cell whose attention and LM head are exact: the family, the budget, bits a weight of the FFNs, KL, and the cell."""

    family: str
    budget: float | None
    bits: float
    kl: float
    cell: dict[str, Any]

    @property
    def group(self) -> str:
        """Of the family; cells of families that are no more have none."""
        return GROUPS.get(self.family, "")


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of a folder, by the name of their file without its suffix."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("frontier-*.json"))}


def points(result: dict[str, Any]) -> list[Point]:
    """The cells in which the FFNs alone are quantised, in the order of the families, then of bits."""
    order = {name: place for place, name in enumerate(GROUPS)}
    found = []
    for cell in result["cells"]:
        family, budget, attention, head = cell["key"]
        if family in order and attention is None and head is None:
            found.append(Point(family, budget, cell["bits"]["ffn"], cell["kl"], cell))
    return sorted(found, key=lambda point: (order[point.family], point.bits))


def whole_cells(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells with attention or LM head in a format."""
    return [cell for cell in result["cells"] if cell["key"][2] is not None or cell["key"][3] is not None]


def envelope(found: Iterable[Point]) -> list[Point]:
    """The points of the lower convex hull in (bits, log KL): what a mixture of two of them beats is left out."""
    hull: list[Point] = []
    for point in sorted(found, key=lambda point: (point.bits, point.kl)):
        if hull and point.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(one: Point, other: Point) -> float:
    return math.log(other.kl / one.kl) / (other.bits - one.bits) if other.bits > one.bits else -math.inf


def bits_at(found: Sequence[Point], kl: float) -> float | None:
    """Bits a weight at a KL: between the two neighbours on the hull, straight in log KL; None where there are no two."""
    hull = envelope(found)
    for one, other in itertools.pairwise(hull):
        if other.kl <= kl <= one.kl:
            share = math.log(one.kl / kl) / math.log(one.kl / other.kl)
            return one.bits + share * (other.bits - one.bits)
    return None


def megabytes(result: dict[str, Any], bits: dict[str, float]) -> float:
    """Bytes of weights a token, in 10^6, of FFNs, attention and LM head at so many bits a weight each."""
    return float(sum(result["sizes"][part] * bits[part] for part in ("ffn", "attention", "head")) / 8e6)
