"""`clada run`: generate text with an engine."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from clada_export.cli.options import (
    engine_arguments,
    generation_arguments,
    generation_settings,
    open_engine,
    output_arguments,
)
from clada_export.cli.token_output import TokenOutput, tell_cut, tell_speed
from clada_export.errors import UsageError

_STDIN = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; `handler` is what runs it."""
    parser.set_defaults(handler=run)
    parser.add_argument(
        "--prompt", action="append", required=True, help="a text, or - for that on stdin; give it again for a batch"
    )
    parser.add_argument("--chat", action="store_true", help="the prompts are user messages: use the model's chat template")
    engine_arguments(parser)
    generation_arguments(parser, new_tokens=64)
    output_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Returns the exit code.

    Raises:
        CladaError: what a user has to know; it has the exit code.
    """
    prompts: list[Any] = _prompts(options.prompt)
    streaming = len(prompts) == 1 and not options.json
    if options.show_load and not streaming:
        raise UsageError("--show-load shows the text of one prompt; give one, without --json")
    engine = open_engine(options)
    if options.chat:
        prompts = [engine.chat_prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    settings = generation_settings(options)
    if streaming:
        stream = engine.stream(prompts[0], options.max_new_tokens, **settings)
        output = TokenOutput(show_load=options.show_load, quiet=options.quiet)
        output.begin()
        output.write(stream)
        output.loads()
        tell_cut(engine, stream.finish, len(stream.tokens), quiet=options.quiet)
        output.speed()
        return 0
    made = engine.generate(prompts, options.max_new_tokens, **settings)
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
    else:
        for text in made.texts or []:
            print(text)
        for row, finish in enumerate(made.finish):
            tell_cut(engine, finish, len(made.tokens[row]), quiet=options.quiet, row=row)
    if per_token is not None:
        tell_speed(per_token, made.ttft_s, sparsity, quiet=options.quiet)
    return 0


def _prompts(given: list[str]) -> list[str]:
    """The prompts, that on stdin in its place: all of it, without the line break at its end."""
    from clada_export.runtime.tokens import require_text

    if given.count(_STDIN) > 1:
        raise UsageError("--prompt - stands for stdin, which can be read once; give it once")
    for row, prompt in enumerate(given):
        require_text(prompt, f"--prompt {row + 1}")
    return [_stdin() if prompt == _STDIN else prompt for prompt in given]


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt -: stdin is no UTF-8 text: {error}") from error
