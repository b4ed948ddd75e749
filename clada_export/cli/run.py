"""`clada run`: generate text with an engine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from clada_export.cli.options import device_argument, load_value, output_arguments
from clada_export.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; `handler` is what runs it."""
    parser.set_defaults(handler=run)
    parser.add_argument("folder", type=Path, metavar="OUT", help="what clada-export wrote")
    parser.add_argument("--prompt", action="append", required=True, help="a text; give it again for a batch")
    parser.add_argument("--chat", action="store_true", help="the prompts are user messages: use the model's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument(
        "--load", type=load_value, default="auto", help="auto (follow the text), dense, or a number: higher is denser"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None)
    device_argument(parser)
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare the files with the manifest (sizes only), nor the library"
    )
    output_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Returns the exit code.

    Raises:
        CladaError: what a user has to know; it has the exit code.
    """
    from clada_export.runtime import load_engine
    from clada_export.runtime.tokens import require_text

    for row, prompt in enumerate(options.prompt):
        require_text(prompt, f"--prompt {row + 1}")
    engine = load_engine(options.folder, threads=options.threads, verify_files=not options.no_check, device=options.device)
    prompts: list[Any] = list(options.prompt)
    if options.chat:
        if engine.tokenizer is None:
            raise UsageError(f"{options.folder}: this export has no tokenizer, so there is no chat template")
        prompts = [engine.tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    streaming = len(prompts) == 1 and not options.json

    def show(row: int, token: int, text: str) -> None:
        print(text, end="", flush=True)

    made = engine.generate(
        prompts,
        options.max_new_tokens,
        load=options.load,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stream=show if streaming else None,
    )
    neurons = engine.sparse_neurons
    finite = made.active.sum(-1)[made.loads > float("-inf")] if made.active is not None else None
    sparsity = 1.0 - float(finite.mean()) / neurons if finite is not None and finite.size and neurons else None
    per_token = sorted(made.decode_s)[len(made.decode_s) // 2] if made.decode_s else None
    if options.json:
        print(
            json.dumps(
                {
                    "texts": made.texts,
                    "tokens": made.tokens,
                    "finish": made.finish,
                    "ttft_s": made.ttft_s,
                    "itl_p50_s": per_token,
                    "sparsity": sparsity,
                }
            )
        )
    elif streaming:
        print()
    else:
        for text in made.texts or []:
            print(text)
    if not options.quiet and per_token is not None:
        skipped = f", {sparsity:.1%} of FFN neurons skipped" if sparsity is not None else ""
        print(f"{1 / per_token:.1f} tokens/s, first token after {made.ttft_s:.2f} s{skipped}", file=sys.stderr)
    return 0
