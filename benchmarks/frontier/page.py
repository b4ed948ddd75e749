"""Fill in the results of `docs/frontier.md` from `benchmarks/results/frontier-*.json`, so that no number is typed by hand.

python -m benchmarks.frontier.page           # fills the page in, and draws the pictures
python -m benchmarks.frontier.page --check   # exit code 1 if the page is not what the results give
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.frontier.plot import draw
from benchmarks.frontier.read import TARGETS, Point, bits_at, megabytes, points, recorded, whole_cells
from benchmarks.markers import fill
from benchmarks.table import markdown

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "frontier.md"
DISTORTION = "distortion.json"
NOTHING = "No results are recorded yet."
WORDS = {"users": "llama.cpp", "dense": "dense", "skip": "skipping"}


def section(name: str, result: dict[str, Any], picture: bool) -> str:
    """What the page says about one result."""
    key, sizes, machine = result["key"], result["sizes"], result["machine"]
    settings, found = key["settings"], points(result)
    texts = ", ".join(f"{text['windows']} x {text['window_tokens']} of {text['name']}" for text in key["texts"])
    dense = result["cells"][0]["dense_ppl"]
    parts = [
        f"### {key['model']['name']}" + (" (products in float32)" if name.endswith("-float32") else ""),
        f"{sizes['layers']} layers, hidden size {sizes['hidden_size']}, FFN width {sizes['intermediate_size']}; weights: FFNs "
        f"{sizes['ffn'] / 1e6:.0f} M, attention {sizes['attention'] / 1e6:.0f} M, LM head {sizes['head'] / 1e6:.0f} M. Tokens: "
        f"{texts}, of which {settings['prompt']} of each window are the prompt. Exact perplexity {dense:.2f}. "
        + ("Quantised in a rotated basis" if settings["rotated"] else "Quantised in its own basis")
        + (f" (blocks of {settings['turned_block']} shuffled coordinates). " if settings.get("turned_block") else ". ")
        + f"Products of the measured passes in {'float32' if settings['precision'] == 'ieee' else 'bfloat16'}. "
        f"{machine['cpu']}, {machine['threads']} threads. Commit {str(result['commit'])[:10]}.",
    ]
    equal = _equal(found)
    parts += (
        ["Bits read, a weight of the FFNs, at equal KL (between measured points, straight in log KL):", equal] if equal else []
    )
    parts += ["Every cell; bits and shares of neurons are those measured after the prompts:", _cells(found)]
    if whole_cells(result):
        parts += ["Attention and LM head (16 bits a weight where they are exact), and whole models:", _whole(result)]
    if picture:
        parts.append(f"![KL against bits, and against bytes of the whole model](../benchmarks/results/{name}.svg)")
    return "\n\n".join(parts)


def _equal(found: Sequence[Point]) -> str | None:
    """Families, and the best of the dense ones, at the KL targets; None where nothing crosses a target."""
    dense = {kl: bits_at([point for point in found if point.group in ("users", "dense")], kl) for kl in TARGETS}
    rows = [
        ["best of llama.cpp", *_at([point for point in found if point.group == "users"], dense)],
        ["best dense", *_at([point for point in found if point.group in ("users", "dense")], dense)],
        ["best with skipping", *_at([point for point in found if point.group == "skip"], dense)],
    ]
    for family in dict.fromkeys(point.family for point in found):
        cells = _at([point for point in found if point.family == family], dense)
        if any(cell != "-" for cell in cells):
            rows.append([family, *cells])
    if all(cell == "-" for row in rows for cell in row[1:]):
        return None
    return markdown(["", *(f"KL {kl:g} (best dense = 1)" for kl in TARGETS)], rows)


def _at(found: Sequence[Point], dense: dict[float, float | None]) -> list[str]:
    cells = []
    for kl, best in dense.items():
        bits = bits_at(found, kl)
        cells.append("-" if bits is None else f"{bits:.2f}" + (f" ({bits / best:.2f})" if best else ""))
    return cells


def _cells(found: Sequence[Point]) -> str:
    rows = []
    for point in found:
        cell, skips = point.cell, point.group == "skip"
        rows.append(
            [
                point.family,
                WORDS.get(point.group, ""),
                f"{point.bits:.2f}",
                f"{point.kl:.4f} ± {cell['kl_error']:.4f}",
                f"{cell['ppl_increase']:+.1%} ± {cell['ppl_increase_error']:.1%}",
                f"{cell['top1']:.1%}",
                f"{1 - cell['whole'] - cell['medium']:.0%} / {cell['medium']:.0%}" if skips else "",
                f"{cell['predicted_kl']:.4f}" if point.budget is not None else "",
            ]
        )
    head = ["format", "kind", "bits", "KL", "perplexity", "top-1", "skipped / high planes only", "KL that prices foretold"]
    return markdown(head, rows)


def _whole(result: dict[str, Any]) -> str:
    rows = []
    for cell in whole_cells(result):
        family, budget, attention, head = cell["key"]
        ffn = "exact" if family is None else f"{family}{f' at {budget:g}' if budget else ''}"
        rows.append(
            [
                ffn,
                attention or "exact",
                head or "exact",
                "" if family is None else f"{cell['bits']['ffn']:.2f}",
                "" if None in (family, attention, head) else f"{megabytes(result, cell['bits']):.1f}",
                f"{cell['kl']:.4f}",
                f"{cell['ppl_increase']:+.1%} ± {cell['ppl_increase_error']:.1%}",
                f"{cell['top1']:.1%}",
            ]
        )
    return markdown(["FFNs", "attention", "LM head", "FFN bits", "MB a token", "KL", "perplexity", "top-1"], rows)


def normal(result: dict[str, Any]) -> str:
    """What the page says about the errors on normal weights."""
    one = [[item["name"], f"{item['bits']:.2f}", f"{item['error']:.4f}", f"{item['worth']:+.2f}"] for item in result["one"]]
    two = [[item["name"], f"{item['bits']:.2f}", f"{item['high']:.4f}", f"{item['error']:.4f}"] for item in result["two"]]
    return "\n\n".join(
        (
            "### Normal weights",
            f"Relative error of {result['rows']} x {result['row']} normal numbers. `worth`: bits ahead of `4 offset f16` at "
            "equal error, if a bit more halves it.",
            markdown(["one plane", "bits", "error", "worth"], one),
            markdown(["two planes", "bits", "error of the high plane", "error of both"], two),
        )
    )


def current(results: Path, page: str) -> str:
    """The page that the recorded results give."""
    found = recorded(results).items()
    sections = [section(name, result, (results / f"{name}.svg").is_file()) for name, result in found]
    if (results / DISTORTION).is_file():
        sections.append(normal(json.loads((results / DISTORTION).read_text(encoding="utf-8"))))
    return fill(page, "\n\n".join(sections) or NOTHING)


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS, path: Path = PAGE) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    page = path.read_text(encoding="utf-8")
    if parser.parse_args(arguments).check:
        if page != current(results, page):
            print(f"{path.name} is not what the results give; run: python -m benchmarks.frontier.page", file=sys.stderr)
            return 1
        return 0
    for name, result in recorded(results).items():
        # A check of precision needs no picture.
        if not name.endswith("-float32"):
            draw(result, results / f"{name}.svg")
    path.write_text(current(results, page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
