"""`clada bench`: time an engine, dense against sparse."""

from __future__ import annotations

import argparse
import json
import sys

from clada_export.cli.options import engine_arguments, load_value, open_engine, output_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; `handler` is what runs it."""
    parser.set_defaults(handler=run)
    engine_arguments(parser)
    parser.add_argument("--load", type=load_value, action="append", help="loads to time (default: dense and auto)")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    output_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Returns the exit code.

    Raises:
        CladaError: what a user has to know; it has the exit code.
    """
    from clada_export.runtime.bench import bench

    engine = open_engine(options)
    speeds = bench(
        engine,
        options.load or ["dense", "auto"],
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
    )
    if options.json:
        print(json.dumps([speed.to_dict() for speed in speeds]))
        return 0
    print(f"{'load':>8} {'tokens/s':>9} {'ITL p50':>9} {'p90':>7} {'p99':>7} {'TTFT':>8} {'skipped':>8}")
    for speed in speeds:
        print(
            f"{speed.load:>8} {speed.tokens_per_s:>9.1f} {speed.itl_p50_ms:>6.1f} ms {speed.itl_p90_ms:>7.1f} "
            f"{speed.itl_p99_ms:>7.1f} {speed.ttft_s * 1e3:>5.0f} ms {speed.sparsity:>8.1%}"
        )
    if not options.quiet:
        print(
            "ITL: time between tokens, choosing the token and updating the load included; TTFT: the prompt and its first token",
            file=sys.stderr,
        )
    return 0
