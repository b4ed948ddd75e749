"""`clada bench`: time an engine, dense against sparse."""

from __future__ import annotations

import argparse
import json
import sys

from clada_export.cli.options import engine_arguments, load_value, open_engine, output_arguments

_DEFINITIONS = """\
ITL      time between tokens, choosing the token and updating the load included: median, 90th and 99th percentile
tokens/s 1000 ms / ITL p50, greedy, one text, after a prompt of {tokens} random tokens, {repeats} rounds
TTFT     time to first token: the prompt, which always runs dense, and its first token
active   share of the sparse layers' neurons that were computed while decoding
FFN      weight bytes of these layers that a token reads at that share: counted, not measured
weights  those of attention and head in addition; - where the manifest does not say them (weights that are not quantised)
memory   most that this process held in memory while it generated, mapped weights among it"""


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
    print(
        f"{'load':>8} {'tokens/s':>9} {'ITL p50':>9} {'p90':>7} {'p99':>7} {'TTFT':>8} {'active':>7} "
        f"{'FFN':>10} {'weights':>10} {'memory':>10}"
    )
    for speed in speeds:
        print(
            f"{speed.load:>8} {speed.tokens_per_s:>9.1f} {speed.itl_p50_ms:>6.1f} ms {speed.itl_p90_ms:>7.1f} "
            f"{speed.itl_p99_ms:>7.1f} {speed.ttft_s * 1e3:>5.0f} ms {speed.active_share:>7.1%} {_megabytes(speed.ffn_bytes)} "
            f"{_megabytes(speed.weight_bytes)} {_megabytes(speed.peak_memory)}"
        )
    if not options.quiet:
        print(_DEFINITIONS.format(tokens=options.prompt_tokens, repeats=options.repeats), file=sys.stderr)
    return 0


def _megabytes(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value / 1e6:>7.1f} MB"
