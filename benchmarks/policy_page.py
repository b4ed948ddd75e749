"""Fill `docs/policies.md` and the decision about TEAL from `benchmarks/results/policies-*.json`, and draw the pictures.

python -m benchmarks.policy_page           # writes the text between the markers, and docs/images/policies-NAME.png
python -m benchmarks.policy_page --check   # exit code 1 if a page is not what the results give
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markers import fill
from benchmarks.policy_bytes import TARGETS, curve, needed_bytes
from benchmarks.table import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
PAGE, TEAL = ROOT / "docs" / "policies.md", ROOT / "docs" / "decisions" / "0007-teal.md"
NOTHING = "No results are recorded yet."


def title(name: str) -> str:
    """How a row is called."""
    return f"{name} (simulated, not exported)" if name.startswith("teal") else name


def section(name: str, result: Mapping[str, Any], pictures: set[str]) -> str:
    """All about one model.

    Args:
        pictures: names of the files that exist.
    """
    model, machine, key = result["model"], result["machine"], result["key"]
    texts = ", ".join(f"{text['name']} {text['windows']} x {text['window_tokens']}" for text in result["texts"])
    calibration = result["calibration"]
    lines = [
        f"### {name}",
        "",
        f"{model['layers']} layers, hidden size {model['hidden_size']}, {model['intermediate_size']} neurons a layer; weights: "
        f"{model['weights']}{', rotated' if key['rotated'] else ''}. Held-out text, windows x tokens: {texts}, of which the "
        f"first {key['prompt']} tokens run dense; {result['dense']['tokens']} tokens are scored, dense perplexity "
        f"{result['dense']['ppl']:.2f}. Calibration text: {calibration['text']}; sensitivity and the dense side took "
        f"{calibration['seconds_once']:.0f} s, once for all rows. {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads. Commit {result['commit'] or 'unknown'}.",
        "",
        _cells(result["cells"]),
        "",
    ]
    if f"policies-{name}.png" in pictures:
        lines += [f"![Quality against bytes and speed; sparsity of the layers](images/policies-{name}.png)", ""]
    lines += ["FFN bytes a token, relative to dense, that a policy needs for a KL (between points, by the log of the KL):", ""]
    lines += [_needed(result), ""]
    failed = [cell for cell in result["cells"] if "error" in cell]
    if failed:
        lines += ["Not measured:", ""]
        lines += [f"- {cell['contender']} at {cell['sparsity']:.0%}: {cell['error']}" for cell in failed] + [""]
    return "\n".join(lines)


def _cells(cells: Sequence[Mapping[str, Any]]) -> str:
    head = [
        *("policy", "sparsity aimed at", "measured", "bytes", "packed", "perplexity", "KL", "top-1", "same greedy tokens"),
        *("ms a token", "dense, ms", "speed-up", "calibration, s"),
    ]
    rows = []
    for cell in cells:
        if "quality" not in cell:
            continue
        quality, speed, greedy = cell["quality"], cell.get("speed"), cell.get("greedy")
        rows.append(
            [
                title(cell["contender"]),
                f"{cell['sparsity']:.0%}",
                f"{cell['measured_sparsity']:.1%}",
                f"{cell['bytes']:.3f}",
                f"{cell['packed_bytes']:.3f}" if "packed_bytes" in cell else "",
                f"{quality['ppl']:.2f}",
                f"{quality['kl']:.4f}",
                f"{quality['top1']:.3f}",
                f"{greedy['mean_prefix']:.0f} of {greedy['tokens']}" if greedy else "",
                f"{speed['sparse']['itl_p50_ms']:.1f}" if speed else "",
                f"{speed['dense']['itl_p50_ms']:.1f}" if speed else "",
                f"{speed['speedup']['median']:.2f} ({speed['speedup']['low']:.2f} to {speed['speedup']['high']:.2f})"
                if speed
                else "",
                f"{cell['seconds']['calibration']:.0f}",
            ]
        )
    return markdown(head, rows)


def _needed(result: Mapping[str, Any]) -> str:
    summary = result["summary"]
    names = list(dict.fromkeys(name for item in summary for name in item["needed"]))
    rows = []
    for name in names:
        row = [title(name)]
        for item in summary:
            one, verdict = item["needed"].get(name), item["clada_reads_less"].get(name)
            row += [f"{one['bound']} {one['bytes']:.3f}".strip() if one else "", _word(verdict) if name != "clada" else ""]
        rows.append(row)
    heads = [part for item in summary for part in (f"bytes at KL {item['kl']:g}", "clada reads less")]
    verdicts = "; ".join(f"at KL {item['kl']:g}: {_word(item['holds']) or 'not decided'}" for item in summary)
    table = markdown(["policy", *heads], rows)
    return f"{table}\n\nclada reads fewer bytes than every other policy that trains nothing: {verdicts}."


def _word(verdict: bool | None) -> str:
    return {True: "yes", False: "**no**", None: ""}[verdict]


def teal_section(results: Mapping[str, Mapping[str, Any]]) -> str:
    """TEAL's quality at its bytes, the lines that a row store could skip, and clada's bytes at the same KL."""
    rows = []
    for name, result in results.items():
        ours = curve(result["cells"], "clada")
        for cell in result["cells"]:
            if not cell["contender"].startswith("teal") or "quality" not in cell:
                continue
            kl = cell["quality"]["kl"]
            clada = needed_bytes(ours, kl)
            rows.append(
                [
                    name,
                    cell["contender"],
                    f"{cell['bytes']:.3f}",
                    f"{kl:.4f}",
                    f"{clada.bound} {clada.bytes:.3f}".strip() if clada else "",
                    f"{cell['lines_skipped']:.1e}",
                    f"{cell['lines_skipped_if_independent']:.1e}",
                ]
            )
    if not rows:
        return NOTHING
    head = [
        *("model", "policy", "bytes in its own layout", "KL", "clada's bytes at that KL", "lines of x skipped"),
        "if channels were independent",
    ]
    return markdown(head, rows)


def draw(name: str, result: Mapping[str, Any], path: Path) -> None:
    """KL against bytes, KL against speed, and the sparsity of each layer under clada, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(18, 6), layout="constrained")
    names = list(dict.fromkeys(cell["contender"] for cell in result["cells"] if "quality" in cell))
    marks = "os^vD*Px"
    for number, contender in enumerate(names):
        cells = [cell for cell in result["cells"] if cell["contender"] == contender and "quality" in cell]
        look: dict[str, Any] = {
            "color": "black" if contender == "clada" else f"C{number % 10}",
            "marker": marks[number // 3 % len(marks)],
            "linewidth": 2.5 if contender == "clada" else 1,
            "linestyle": "--" if contender.startswith("teal") else "-",
            "label": title(contender),
        }
        left.plot([cell["bytes"] for cell in cells], [max(cell["quality"]["kl"], 1e-6) for cell in cells], **look)
        timed = [cell for cell in cells if "speed" in cell]
        if timed:
            speeds = [cell["speed"]["speedup"]["median"] for cell in timed]
            middle.plot(speeds, [max(cell["quality"]["kl"], 1e-6) for cell in timed], **look)
    for axes in (left, middle):
        for target in TARGETS:
            axes.axhline(target, color="0.8", zorder=0)
        axes.set(yscale="log", ylabel="KL to the dense model, nats a token")
        if axes.get_legend_handles_labels()[0]:  # no cell was timed yet: nothing to name
            axes.legend(fontsize=7)
    left.set(xlabel="FFN bytes a token, dense = 1", title="Quality against bytes")
    middle.set(xlabel="decode speed, the same graph dense = 1", title="Quality against measured speed")
    for cell in result["cells"]:
        if cell["contender"] == "clada" and "quality" in cell:
            shares = [100 * share for share in cell["layer_sparsity"]]
            right.plot(range(len(shares)), shares, marker=".", label=f"{cell['sparsity']:.0%}")
    right.set(xlabel="layer", ylabel="neurons skipped, %", ylim=(0, 100), title="clada: sparsity of the layers")
    right.legend(fontsize=7)
    figure.suptitle(f"{name} on {result['machine']['cpu']}, threads: {result['machine']['threads']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib the same result gives the same bytes for longer.
    figure.savefig(path, metadata={"Software": None}, dpi=110)
    plt.close(figure)


def recorded() -> dict[str, dict[str, Any]]:
    """Finished results by name: `policies-NAME.json`."""
    results = {}
    for path in sorted(RESULTS.glob("policies-*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.get("benchmark") == "policies" and "summary" in value:
            results[path.stem.removeprefix("policies-")] = value
    return results


def current() -> dict[Path, str]:
    """The pages that the recorded results give."""
    results = recorded()
    pictures = {path.name for path in IMAGES.glob("*.png")}
    sections = [section(name, result, pictures) for name, result in results.items()]
    texts = {PAGE: "\n".join(sections) or NOTHING, TEAL: teal_section(results)}
    return {path: fill(path.read_text(encoding="utf-8"), text) for path, text in texts.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    if not parser.parse_args(arguments).check:
        try:
            for name, result in recorded().items():
                draw(name, result, IMAGES / f"policies-{name}.png")
        except ImportError:
            print("no pictures: matplotlib is missing (pip install 'clada-export[eval]')", file=sys.stderr)
        for path, text in current().items():
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [path for path, text in current().items() if path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is not what the results give; run: python -m benchmarks.policy_page", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
