"""The picture of a model: KL against bits of the FFNs, and against bytes of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.frontier.read import TARGETS, Point, envelope, megabytes, points, whole_cells

NAMED = {
    "Q4_K to Q8_0, shared": "C0",
    "dense 4 to 6 compensated, shared": "C1",
    "4+4 round to nearest, two": "C3",
    "4+2 search, two": "C4",
    "4+2 compensated, one": "C5",
    "4+2 compensated, two": "C2",
    "4 compensated, one": "C6",
    "4+0 to 4+4 compensated, shared, two": "black",
}
"""Curves with a name of their own in the picture; the others are points in grey."""


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture. The same result gives the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "clada"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), width_ratios=(1.5, 1), layout="constrained")
    found = points(result)
    for name, colour in NAMED.items():
        line = [point for point in found if point.family == name]
        if line:
            left.plot(*_axes(line), marker="o", markersize=4, color=colour, label=name)
    users = [point for point in found if point.group == "users" and point.family not in NAMED]
    left.plot(*_axes(users), "s", color="C0", label="llama.cpp, one format")
    for point in users:
        left.annotate(point.family, (point.bits, point.kl), fontsize=7, xytext=(4, 3), textcoords="offset points")
    dense = [point for point in found if point.group == "dense" and point.family not in NAMED]
    left.plot(*_axes(dense), "x", color="C1", label="dense, other quantisers")
    rest = [point for point in found if point.group == "skip" and point.family not in NAMED]
    left.plot(*_axes(rest), ".", color="0.6", label="skipping, others")
    hull = envelope(point for point in found if point.group in ("users", "dense"))
    left.plot(*_axes(hull), "--", color="0.7", zorder=0, label="best of the dense ones")
    for target in TARGETS:
        left.axhline(target, color="0.9", zorder=-1)
    left.set(yscale="log", xlabel="bits read, a weight of the FFNs", ylabel="KL(exact || quantised), nats a token")
    left.set_title("FFNs alone")
    left.legend(fontsize=7)
    for cell in whole_cells(result):
        family, budget, attention, head = cell["key"]
        if None in (family, attention, head):
            continue
        skips = cell.get("whole", 1.0) < 0.999
        place = (megabytes(result, cell["bits"]), cell["kl"])
        right.plot(*place, "o" if skips else "s", color="black" if skips else "C0")
        text = f"{family}{f' @ {budget:g}' if budget else ''}\nattention {attention}, head {head}"
        right.annotate(text, place, fontsize=6, xytext=(4, 3), textcoords="offset points")
    right.set(yscale="log", xlabel="weights read, MB a token", title="FFNs, attention and LM head")
    right.margins(x=0.35, y=0.15)
    figure.suptitle(result["key"]["model"]["name"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _axes(line: list[Point]) -> tuple[list[float], list[float]]:
    return [point.bits for point in line], [point.kl for point in line]
