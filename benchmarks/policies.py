"""All policies side by side on one model: quality, bytes and speed at several sparsities.

    python benchmarks/policies.py MODEL.gguf --out benchmarks/results/policies-NAME.json
    python benchmarks/policies.py MODEL.gguf --out benchmarks/results/policies-NAME-rotated.json --rotated

Every cell (a policy at a sparsity) is written when it is finished, and a run that was cut off goes on where it stood; `--again`
measures anew. The plans are kept in the work folder: a first run with `--no-speed`, on a machine that does other things too,
and a second without it, when the machine is quiet, calibrate once. At the end come further sparsities, for quality alone, of
the policies that train nothing, until the target KLs lie between points. `python -m benchmarks.policy_page` then makes the
tables and plots of `docs/policies.md`.

Calibration uses the tool's own text, quality is measured on the texts of `benchmarks/texts.py`, which calibration never saw.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import environment
from benchmarks.child import ChildFailedError, run_child
from benchmarks.decode import locate, say
from benchmarks.policy_bytes import TARGETS, next_extra, summarise
from benchmarks.policy_results import Contender, Results, Settings, contenders, grid
from benchmarks.texts import Text, heldout_texts
from clada_export.errors import CladaError

SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
EXTRA = (0.05, 0.1, 0.2, 0.8, 0.9)


def run(
    place: str,
    results: Results,
    chosen: Sequence[Contender],
    sparsities: Sequence[float],
    settings: Settings,
    texts: list[Text],
    work: Path,
    plans: Path,
    *,
    speed: bool,
    extra: Sequence[float],
    again: bool,
) -> None:
    """Measure what is missing."""
    bench = None

    def do(cells: list[tuple[Contender, float]], with_speed: bool, redo: bool) -> None:
        nonlocal bench
        wanted = [cell for cell in cells if redo or not results.has(*cell, with_speed)]
        if len(wanted) < len(cells):
            say(f"{len(cells) - len(wanted)} of {len(cells)} cells are kept from before")
        if not wanted:
            return
        if bench is None:
            # Loading a model takes longer than finding that nothing is left to do.
            from benchmarks.policy_bench import Bench

            bench = Bench(place, settings, texts, work, plans)
            results.describe(
                model=bench.model,
                **environment.describe(settings.threads),
                texts=bench.texts,
                calibration=bench.calibration,
                dense=bench.dense,
            )
        began = time.perf_counter()
        for done, (contender, sparsity) in enumerate(wanted):
            left = (time.perf_counter() - began) / done * (len(wanted) - done) / 60 if done else None
            say(f"[{done + 1}/{len(wanted)}] {contender.name} {sparsity:g}" + (f", {left:.0f} min left" if left else ""))
            results.put(bench.cell(contender, sparsity, with_speed, None if redo else results.finished(contender, sparsity)))

    do(grid(chosen, sparsities), speed, again)
    # Points that the bytes at a KL lie between; one after the other, for the next depends on the last.
    for contender in chosen:
        # Training costs too much for it, and pruned weights that are not packed read the same at any sparsity.
        varies = contender.kind != "static" or contender.settings.pattern == "neurons"
        while varies and not contender.trained:
            found = [one for one in results.cells if one["contender"] == contender.name and "quality" in one]
            points = [(one["sparsity"], one["bytes"], one["quality"]["kl"]) for one in found]
            tried = [one["sparsity"] for one in results.cells if one["contender"] == contender.name]
            following = next_extra(points, TARGETS, [value for value in extra if value not in tried])
            if following is None:
                break
            do([(contender, following)], False, False)
    results.describe(summary=summarise(results.cells))


def _shares(text: str) -> list[float]:
    values = [float(part) for part in text.split(",") if part]
    if not all(0.0 < value < 1.0 for value in values):
        raise argparse.ArgumentTypeError("sparsities are above 0 and below 1")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="policies.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", help="a .gguf file, a folder or a Hub id; smollm2 and smollm2-rotated are known by name")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file of results")
    parser.add_argument("--rotated", action="store_true", help="rotate the model first (benchmarks/rotate.py)")
    parser.add_argument("--policies", type=lambda text: text.split(","), help="rows of the table (default: all)")
    parser.add_argument("--sparsities", type=_shares, default=list(SPARSITIES), help="default: 0.3,0.4,0.5,0.6,0.7")
    parser.add_argument("--extra", type=_shares, default=list(EXTRA), help="further ones, for the bytes at a KL; '' for none")
    parser.add_argument("--no-speed", action="store_true", help="quality and bytes only: no engine is built")
    parser.add_argument("--again", action="store_true", help="measure finished cells of the table anew")
    parser.add_argument("--windows", type=int, default=4, help="of each held-out text (default: 4)")
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--context", type=int, default=512, help="of calibration")
    parser.add_argument("--new-tokens", type=int, default=64, help="decoded on the clock for each of four prompts")
    parser.add_argument("--prompts", type=int, default=4, help="rounds of speed, and texts of the greedy prefix")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", action="append", type=Path, default=[], help="a held-out text; again for more")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"))
    return parser


def rotated(place: str, name: str, work: Path) -> str:
    """The folder of a model's rotated copy, which is made when it is missing."""
    folder = work / "models" / f"{name}-rotated"
    if not folder.is_dir():
        say(f"rotating {name} (about a minute)")
        folder.parent.mkdir(parents=True, exist_ok=True)
        run_child("benchmarks.rotate:main", [place, str(folder)], work / "models" / "rotate.json")
    return str(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = _parser().parse_args(arguments)
    prompt = max(1, min(128, options.window_tokens // 4))
    settings = Settings(
        options.context,
        options.windows,
        options.window_tokens,
        prompt,
        options.prompts,
        options.new_tokens,
        options.threads,
        options.seed,
    )
    try:
        chosen = contenders(options.policies)
        name, place = locate(options.model, options.work)
        if options.rotated:
            place = rotated(place, name, options.work)
        texts = heldout_texts(options.work / "texts", options.text)
        digests = [hashlib.sha256(text.text.encode()).hexdigest() for text in texts]
        key = {**asdict(settings), "texts": digests, "rotated": options.rotated}
        results = Results(options.out, key)
        # Each run has its own, for two may run side by side.
        work = options.work / f"policies-{os.getpid()}"
        work.mkdir(parents=True, exist_ok=True)
        try:
            run(
                place,
                results,
                chosen,
                options.sparsities,
                settings,
                texts,
                work,
                options.work / "plans",
                speed=not options.no_speed,
                extra=options.extra,
                again=options.again,
            )
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except CladaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ChildFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for item in results.value["summary"]:
        say(f"KL {item['kl']:g}: " + ", ".join(f"{n} {b['bound']} {b['bytes']:.3f}" for n, b in item["needed"].items()))
        say(f"  clada reads less than every other policy that trains nothing: {item['holds']}")
    failed = [cell for cell in results.cells if "error" in cell]
    for cell in failed:
        say(f"failed: {cell['contender']} {cell['sparsity']:g}: {cell['error']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
