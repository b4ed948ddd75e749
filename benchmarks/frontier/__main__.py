"""Simulate formats with and without skipping on a model, and write what they cost and read.

python -m benchmarks.frontier MODEL --name smollm2 --budgets 4.5 5 5.5
python -m benchmarks.frontier.page          # the picture and docs/frontier.md, from the results

Cells that the result file holds already are not measured again.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.frontier.bench import Bench, Settings
from benchmarks.frontier.families import FAMILIES, Cell, cells_of, family
from benchmarks.frontier.grids import Grid
from benchmarks.frontier.results import Results
from benchmarks.quality import Windows, cut
from benchmarks.texts import heldout_texts
from clada_export.calibration.text import default_text
from clada_export.decoder.torch_decoder import require_torch
from clada_export.errors import CladaError, UsageError
from clada_export.source.load import load_source

RESULTS = environment.ROOT / "benchmarks" / "results"
PASS = 12
"""Cells that are measured side by side: hidden states of all of them are in memory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except CladaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a .gguf file, a folder or a Hub id")
    parser.add_argument("--name", required=True, help="of the result: benchmarks/results/frontier-NAME.json")
    parser.add_argument("--families", nargs="*", default=["*"], metavar="PATTERN", help="names of curves (default: all)")
    parser.add_argument(
        "--budgets", nargs="*", type=float, default=[4.5, 5.0, 5.5], metavar="BITS", help="of the FFN's weights"
    )
    parser.add_argument(
        "--whole",
        nargs="*",
        default=[],
        metavar="FFN@BITS,ATTENTION,HEAD",
        help="cells of whole models, `exact` for what stays so",
    )
    parser.add_argument("--text", nargs="*", type=Path, default=[], metavar="FILE", help="held-out texts")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a window that skip nothing and are not scored")
    parser.add_argument("--windows", type=int, default=2, help="of each held-out text")
    parser.add_argument("--precision", choices=("ieee", "bf16"), default="ieee", help="of matrix products in measured passes")
    parser.add_argument("--as-stored", action="store_true", help="quantise in the model's own basis, not in a rotated one")
    parser.add_argument("--turned-block", type=int, metavar="D", help="coordinates that the rotation mixes (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument(
        "--work", type=Path, default=environment.ROOT / "build" / "frontier", help="what takes long is kept here"
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    families = [one for one in FAMILIES if any(fnmatch.fnmatchcase(one.name, pattern) for pattern in options.families)]
    if not families and not options.whole:
        raise UsageError(
            f"no curve is called {' or '.join(options.families)}; there are: {', '.join(x.name for x in FAMILIES)}"
        )
    cells = [*cells_of(families, options.budgets), *map(_whole_cell, options.whole)]
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {text}", flush=True)

    source = load_source(options.model)
    if source.tokenizer is None:
        raise UsageError(f"{options.model}: the model has no tokenizer, and this needs one for real text")
    say("the model is loaded")
    settings = Settings(
        options.context,
        options.prompt,
        options.windows,
        5,
        not options.as_stored,
        options.seed,
        options.precision,
        options.turned_block,
    )
    texts = [
        cut(text.name, text.digest, _ids(source.tokenizer, text.text), settings.windows, settings.context)
        for text in heldout_texts(environment.ROOT / "build" / "benchmarks" / "texts", options.text)
    ]
    key = {
        "model": {"name": source.name, "weights_digest": source.weights_digest},
        "texts": [text.to_dict() for text in texts],
        "settings": settings.key(),
    }
    results = Results(options.out / f"frontier-{options.name}.json", key)
    missing = [cell for cell in dict.fromkeys(cells) if not results.has(cell)]
    if not missing:
        say("nothing is missing")
        return
    basis = f"turned-{settings.turned_block or 'all'}-{settings.seed}" if settings.rotated else "stored"
    work = options.work / f"{source.weights_digest[:16]}-{basis}"
    calibration = _calibration(source.tokenizer, settings)
    chosen = list(dict.fromkeys(family(cell.family) for cell in missing if cell.family is not None))
    compensates = any(isinstance(form, Grid) and form.compensated for one in chosen for form in one.forms)
    decoder = require_torch(source.decoder, "the simulation")
    bench = Bench(decoder, _tensor(texts), calibration, settings, work, compensates, say)
    results.value |= {"sizes": bench.sizes, "prices": list(bench.prices), **environment.describe(torch.get_num_threads())}
    tables = bench.tables(chosen)
    for group in _passes(missing):
        for cell, found in zip(group, bench.measure(group, tables), strict=True):
            results.put(cell, found)
            say(f"{cell.key}: {found['bits']['ffn']:.2f} bits, KL {found['kl']:.4f}, perplexity {found['ppl_increase']:+.1%}")


def _passes(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that can be measured side by side: of one format of attention, at most `PASS`."""
    groups: dict[str | None, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.attention, []).append(cell)
    return [group[start : start + PASS] for group in groups.values() for start in range(0, len(group), PASS)]


def _whole_cell(text: str) -> Cell:
    """`FFN@BITS,ATTENTION,HEAD`.

    Raises:
        UsageError: it is not of this form.
    """
    # A family's name may hold commas.
    parts = text.rsplit(",", 2)
    if len(parts) != 3:
        raise UsageError(f"--whole {text}: FFN@BITS,ATTENTION,HEAD is wanted, with `exact` for what stays so")
    ffn, attention, head = (None if part == "exact" else part for part in parts)
    name, _, bits = (ffn or "").partition("@")
    try:
        single = ffn is None or family(name).single
        return Cell(name or None, None if single else float(bits), attention, head)
    except (KeyError, ValueError):
        raise UsageError(f"--whole {text}: {ffn} is no family, or has no number of bits") from None


def _ids(tokenizer: Any, text: str) -> list[int]:
    # Enough for windows spread over a text, and not a minute of tokenising.
    ids: list[int] = tokenizer(text[:400_000], add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _calibration(tokenizer: Any, settings: Settings) -> Tensor:
    return torch.tensor(cut("calibration", "", _ids(tokenizer, default_text()), settings.calibration, settings.context).rows)


def _tensor(texts: Sequence[Windows]) -> Tensor:
    return torch.tensor([row for text in texts for row in text.rows])


if __name__ == "__main__":
    sys.exit(main())
