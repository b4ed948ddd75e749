"""Fill in the results of `docs/load-experiment.md` from `benchmarks/results/load-*.json`, so that no number is typed by hand.

python -m benchmarks.load_page           # fills the page in, and draws the pictures
python -m benchmarks.load_page --check   # exit code 1 if the page is not what the results give
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.markers import fill
from clada_export.lab.load_experiment.report import plot, tables, verdict

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "load-experiment.md"
NOTHING = "No results are recorded yet."


def section(name: str, result: dict[str, Any], picture: bool) -> str:
    """What the page says about one result.

    Args:
        name: of the file, without its suffix.
        picture: whether there is one beside it.
    """
    settings, versions = result["settings"], result["versions"]
    setup = (
        f"Score {settings['score']}, {settings['sparsity']:.0%} of neurons skipped, documents of {settings['context']} tokens, "
        f"of which {settings['prompt_tokens']} are the prompt; calibrated on {settings['calibration_tokens']} tokens of "
        f"{settings['calibration_text']}, allocation {settings['allocation']}, seed {settings['seed']}. "
        + ", ".join(f"{key} {value}" for key, value in versions.items())
        + "."
    )
    parts = [f"### {result['model']['name']}", setup, verdict(result), tables(result)]
    if picture:
        parts.append(f"![KL of each arm against still, with intervals](../benchmarks/results/{name}.png)")
    return "\n\n".join(parts)


def recorded() -> dict[str, dict[str, Any]]:
    """The recorded results, by the name of their file without its suffix."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("load-*.json"))}


def current() -> str:
    """The page that the recorded results give."""
    found = recorded().items()
    sections = [section(name, result, (RESULTS / f"{name}.png").is_file()) for name, result in found]
    return fill(PAGE.read_text(encoding="utf-8"), "\n\n".join(sections) or NOTHING)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    if not parser.parse_args(arguments).check:
        for name, result in recorded().items():
            plot(result, RESULTS / f"{name}.png", lambda text: print(text, file=sys.stderr))
        PAGE.write_text(current(), encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") != current():
        print("docs/load-experiment.md is not what the results give; run: python -m benchmarks.load_page", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
