"""The page of what exports cost (`docs/export-cost.md`), from what `benchmarks.export_cost` recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import ROOT
from benchmarks.markers import fill
from benchmarks.table import markdown

PAGE = ROOT / "docs" / "export-cost.md"
PICTURE = ROOT / "docs" / "images" / "export-cost.svg"
SHARE = 1.3
"""Of the float32 weights: what more of them may take at most in memory."""
_COLOURS = {
    "start": "0.75",
    "source": "C0",
    "round": "C6",
    "calibrate": "C1",
    "trace": "C2",
    "rewrite and write": "C3",
    "verify": "C4",
    "finish": "0.6",
}


def write_page(result: dict[str, Any]) -> None:
    """Fill the page, and draw its picture if matplotlib is there."""
    draw(result, PICTURE)
    PAGE.write_text(current(result, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def current(result: dict[str, Any], page: str) -> str:
    """The page with the recorded results in their place."""
    cells = list(result["cells"].values())
    measured = [cell for cell in cells if "seconds" in cell]
    if not cells:
        return fill(page, "No results are recorded yet.")
    parts = []
    if measured:
        parts += ["### Whole exports", whole_table(measured), "### Stages", stage_table(measured)]
        series = "\n\n".join(_series(measured))
        if series:
            parts += ["### Against depth", series]
        parts += ["### What was predicted", predicted_table(measured), predicted_stages(measured)]
        if PICTURE.is_file():
            parts.append("![Seconds by stage, and memory against depth](images/export-cost.svg)")
    absent = [f"- {cell['title']}: {cell['missing']}" for cell in cells if "missing" in cell]
    failed = [f"- {cell['title']}: exit code {cell['code']}: {cell['reason']}" for cell in measured if cell["code"] != 0]
    if absent or failed:
        parts += ["### Not measured", "\n".join([*absent, *failed])]
    parts += ["### Machines", "\n".join(_machines(measured))]
    return fill(page, "\n\n".join(parts))


def whole_table(cells: Sequence[dict[str, Any]]) -> str:
    """Seconds and memory of whole exports beside what is wanted."""
    rows = []
    for cell in cells:
        wanted = cell["wanted"]
        rows.append(
            [
                cell["title"],
                f"{cell['seconds']:.0f} s" + _held(cell["seconds"], wanted["seconds"], "s", 1.0, 0),
                f"{cell['peak_bytes'] / 1e9:.2f} GB" + _held(cell["peak_bytes"], wanted["bytes"], "GB", 1e9, 1),
                f"{cell['own_bytes'] / 1e9:.2f} GB",
                f"{cell['predicted']['size']['parameters'] * 4 / 1e9:.2f} GB",
                f"{cell.get('output_bytes', 0) / 1e9:.2f} GB",
                f"{cell['busy_before']:g}",
            ]
        )
    head = ["export", "time (wanted)", "peak memory (wanted)", "of its own", "weights in float32", "engine", "load before"]
    return markdown(head, rows)


def _held(value: float, wanted: float | None, unit: str, scale: float, digits: int) -> str:
    if wanted is None:
        return ""
    verdict = "reached" if value <= wanted else "**missed**"
    return f" ({wanted / scale:.{digits}f} {unit}: {verdict})"


def stage_table(cells: Sequence[dict[str, Any]]) -> str:
    """Seconds, peak memory and own memory of each stage."""
    names = list(dict.fromkeys(stage["name"] for cell in cells for stage in cell["stages"]))
    order = [*(name for name in _COLOURS if name in names), *(name for name in names if name not in _COLOURS)]
    rows = []
    for cell in cells:
        stages = {stage["name"]: stage for stage in cell["stages"]}
        rows.append([cell["name"], *(_stage(stages.get(name)) for name in order)])
    return "Seconds; peak memory, of its own (GB).\n\n" + markdown(["cell", *order], rows)


def _stage(stage: dict[str, Any] | None) -> str:
    if stage is None:
        return ""
    seconds = f"{stage['seconds']:.1f}"
    return f"{seconds}; {stage['peak'] / 1e9:.2f}, {stage['own'] / 1e9:.2f}" if stage["peak"] else seconds


def fits(cells: Sequence[dict[str, Any]]) -> dict[str, list[tuple[str, float, float, float]]]:
    """For each series over depth: what, its value without layers, what a layer adds, and the largest distance from the line."""
    series: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["layers"] is not None and cell["code"] == 0:
            series.setdefault(cell["name"].rpartition("-")[0], []).append(cell)
    found: dict[str, list[tuple[str, float, float, float]]] = {}
    for name, members in series.items():
        if len(members) < 2:
            continue
        depth = np.array([cell["layers"] for cell in members], dtype=np.float64)
        lines = []
        for what, values in _quantities(members):
            slope, start = np.polyfit(depth, values, 1)
            lines.append((what, float(start), float(slope), float(np.abs(values - (start + slope * depth)).max())))
        found[name] = lines
    return found


def _quantities(cells: Sequence[dict[str, Any]]) -> Iterator[tuple[str, np.ndarray]]:
    yield "time, s", np.array([cell["seconds"] for cell in cells])
    for name in [stage["name"] for stage in cells[0]["stages"]]:
        found = [next((stage["seconds"] for stage in cell["stages"] if stage["name"] == name), 0.0) for cell in cells]
        yield f"{name}, s", np.array(found)
    yield "peak memory, GB", np.array([cell["peak_bytes"] for cell in cells]) / 1e9
    yield "of its own, GB", np.array([cell["own_bytes"] for cell in cells]) / 1e9
    yield "weights in float32, GB", np.array([cell["predicted"]["size"]["parameters"] * 4 for cell in cells]) / 1e9


def _series(cells: Sequence[dict[str, Any]]) -> Iterator[str]:
    for name, lines in fits(cells).items():
        rows = [[what, f"{start:.2f}", f"{slope:.3f}", f"{off:.2f}"] for what, start, slope, off in lines]
        known = {what: slope for what, _, slope, _ in lines}
        weights = known["weights in float32, GB"]
        peak, own = known["peak memory, GB"] / weights, known["of its own, GB"] / weights
        depths = ", ".join(str(cell["layers"]) for cell in cells if cell["name"].rpartition("-")[0] == name)
        verdict = "reached" if peak <= SHARE else "**missed**"
        yield f"Cells {name}-N, with {depths} layers: the straight line through them, and how far the farthest lies from it."
        yield markdown(["", "no layers", "a layer", "off by"], rows)
        yield (
            f"A gigabyte more of weights (float32) takes {peak:.2f} GB more at the peak (wanted: at most {SHARE:g}: {verdict}) "
            f"and {own:.2f} GB more of memory that the system can't take back."
        )


def predicted_table(cells: Sequence[dict[str, Any]]) -> str:
    """What `clada inspect` said, beside what was measured."""
    rows = []
    for cell in cells:
        if cell["code"] != 0:
            continue
        said = cell["predicted"]["price"]
        rows.append(
            [
                cell["name"],
                *_beside(said["seconds"], cell["seconds"], 1.0, "s", 0),
                *_beside(said["memory"], cell["peak_bytes"], 1e9, "GB", 2),
                *_beside(said["needed"], cell["own_bytes"], 1e9, "GB", 2),
                *_beside(said["output"], cell.get("output_bytes", 0), 1e9, "GB", 2),
            ]
        )
    pairs = [(what, "measured over said") for what in ("time", "peak memory", "needed memory", "engine")]
    return markdown(["cell", *(name for pair in pairs for name in pair)], rows)


def predicted_stages(cells: Sequence[dict[str, Any]]) -> str:
    """Seconds of each stage, said and measured."""
    good = [cell for cell in cells if cell["code"] == 0]
    names = list(dict.fromkeys(stage["stage"] for cell in good for stage in cell["predicted"]["price"].get("stages", ())))
    rows = []
    for cell in good:
        price = cell["predicted"]["price"]
        said = {stage["stage"]: stage["seconds"] for stage in price.get("stages", ())}
        found = {stage["name"]: stage["seconds"] for stage in cell["stages"]}
        pairs = [f"{said[name]:.0f}, {found[name]:.0f}" if name in said and name in found else "" for name in names]
        rows.append([cell["name"], *pairs])
    return "Seconds by stage, said and measured.\n\n" + markdown(["cell", *names], rows)


def _beside(said: float, found: float, scale: float, unit: str, digits: int) -> tuple[str, str]:
    return f"{said / scale:.{digits}f}, {found / scale:.{digits}f} {unit}", f"{found / said:.2f}" if said else ""


def _machines(cells: Sequence[dict[str, Any]]) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for cell in cells:
        machine, versions = cell["machine"], cell["versions"]
        text = (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['memory_gib']:g} GiB; "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + f"; commit {cell['commit'] or 'unknown'}"
        )
        groups.setdefault(text, []).append(cell["name"])
    for text, names in groups.items():
        yield f"- {', '.join(names)}: {text}"


def draw(result: dict[str, Any], path: Path) -> bool:
    """Seconds by stage, and memory against depth; without matplotlib, or anything measured, nothing."""
    cells = [cell for cell in result["cells"].values() if "seconds" in cell and cell["code"] == 0]
    try:
        import matplotlib
    except ImportError:
        return False
    if not cells:
        return False
    matplotlib.use("Agg")
    # The same result gives the same bytes.
    matplotlib.rcParams["svg.hashsalt"] = "clada"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.35 * len(cells) + 2.5), layout="constrained")
    starts = [0.0] * len(cells)
    for name, colour in _COLOURS.items():
        widths = [sum(stage["seconds"] for stage in cell["stages"] if stage["name"] == name) for cell in cells]
        left.barh(range(len(cells)), widths, left=starts, color=colour, label=name)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    left.set_yticks(range(len(cells)), [cell["name"] for cell in cells])
    left.invert_yaxis()
    left.set(xlabel="seconds", title="Time by stage")
    left.legend(fontsize=7)
    weights = [cell["predicted"]["size"]["parameters"] * 4 / 1e9 for cell in cells]
    right.scatter(weights, [cell["peak_bytes"] / 1e9 for cell in cells], marker="o", label="peak")
    right.scatter(weights, [cell["own_bytes"] / 1e9 for cell in cells], marker="s", label="of its own")
    edge = max(weights) * 1.05
    right.plot([0, edge], [0, edge], color="0.6", linewidth=1, label="the weights")
    for cell, x in zip(cells, weights, strict=True):
        right.annotate(cell["name"], (x, cell["peak_bytes"] / 1e9), fontsize=6, xytext=(3, 3), textcoords="offset points")
    right.set(xlabel="weights in float32, GB", ylabel="memory, GB", title="Memory against size", xlim=(0, None), ylim=(0, None))
    right.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return True
