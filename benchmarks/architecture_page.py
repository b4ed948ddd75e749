"""Write the table of `docs/architectures.md` from `benchmarks/results/architectures.json`.

python -m benchmarks.architecture_page           # fills the page in
python -m benchmarks.architecture_page --check   # exit code 1 if the page is not what the results give
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.markers import fill
from benchmarks.table import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "architectures.json", ROOT / "docs" / "architectures.md"
NOTHING = "No results are recorded yet."
FUSIONS = ("none", "cpu", "cuda")
LONGEST = 150

Row = dict[str, Any]


def has_graph(row: Row) -> bool:
    """Whether the model has dense FFNs and the exporter wrote a graph of it: what the passes can be asked to match."""
    return bool(row["expected"]) and any(isinstance(found, int) for found in row["matched"].values())


def all_matched(row: Row) -> bool:
    """Whether every graph of it has every FFN matched."""
    return all(found == row["expected"] for found in row["matched"].values() if isinstance(found, int))


def verified(row: Row) -> bool:
    """Whether the whole export was made and passed its checks."""
    return bool(row["checks"]) and all(check["passed"] for check in row["checks"]) and not row["failed"]


def section(result: dict[str, Any]) -> str:
    """Everything between the markers."""
    rows: list[Row] = result["rows"]
    graphs = [row for row in rows if has_graph(row)]
    dense = [row for row in rows if row["expected"] and not has_graph(row)]
    none = [row for row in rows if not row["expected"] and row["failed"] not in ("make",) and not row["failed"]]
    other = [row for row in rows if row not in graphs and row not in dense and row not in none]
    false = sum(len(row["false"]) for row in rows)
    full = sum(all_matched(row) for row in graphs)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [
        f"Of {len(rows)} model types, {len(graphs)} have dense FFNs and an ONNX graph. In {full} every FFN is matched in "
        f"every graph; {false} matches are no FFN of the eager model. The whole export passes verification for "
        f"{sum(verified(row) for row in graphs)}. {versions}. {_commits(rows)}.",
        "### With dense FFNs and a graph",
        _table(
            (
                "type",
                "class",
                "FFNs",
                "form",
                *(f"matched, {name}" for name in FUSIONS),
                "export",
                "what is left dense, or failed",
            ),
            [_graph_row(row) for row in graphs],
        ),
        "### With dense FFNs, and no graph",
        "The exporter of transformers, or our use of it, does not give a graph with a cache for these.",
        _table(("type", "class", "FFNs", "form", "why"), [_dense_row(row) for row in dense]),
        "### Without an FFN that the op computes",
        _table(
            ("type", "class", "why"), [(row["model_type"], row["model"], _counted(row["dense"]) or "no FFN") for row in none]
        ),
        "### Not run",
        "No small model of the type could be made from its configuration's defaults, or it does not run on token ids alone.",
        _table(("type", "why"), [(row["model_type"], _short(row["why"])) for row in other]),
    ]
    return "\n\n".join(parts)


def _commits(rows: Sequence[Row]) -> str:
    """The commits that the rows were made with: a long run goes on where it stood."""
    counts = Counter(str(row.get("commit"))[:10] for row in rows)
    return "Rows by commit: " + ", ".join(f"{count} of {commit}" for commit, count in counts.most_common())


def _graph_row(row: Row) -> tuple[str, ...]:
    found = [str(value) if isinstance(value, int) else "no graph" for value in map(row["matched"].get, FUSIONS)]
    export = "verified" if verified(row) else "no"
    return (row["model_type"], row["model"], str(row["expected"]), _forms(row), *found, export, _remarks(row))


def _remarks(row: Row) -> str:
    failed = [f"{check['name']}: {check['why']}" for check in row["checks"] if not check["passed"]]
    remarks = [_counted(row["dense"]), *row["false"], *row["misses"], *failed, row["why"]]
    return _short("; ".join(dict.fromkeys(text for text in remarks if text)))


def _dense_row(row: Row) -> tuple[str, ...]:
    return (row["model_type"], row["model"], str(row["expected"]), _forms(row), _short(row["why"] or _remarks(row)))


def _forms(row: Row) -> str:
    return "; ".join(row["forms"])


def _counted(reasons: dict[str, int]) -> str:
    return "; ".join(f"{count} x {reason}" for reason, count in reasons.items())


def _short(text: str) -> str:
    """One line that a table cell can hold, without the paths of the machine that it was made on."""
    line = re.sub(r"/[\w./-]*/(?=[\w.-]+)", "", " ".join(text.split())).replace("|", "\\|")
    return line if len(line) <= LONGEST else line[: LONGEST - 3].rstrip() + "..."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown(head, rows, numbers=False) if rows else "None."


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    wanted = fill(page, section(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.is_file() else NOTHING)
    if options.check:
        if page != wanted:
            print(f"{PAGE.name} is not what the results give: run python -m benchmarks.architecture_page", file=sys.stderr)
        return int(page != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
