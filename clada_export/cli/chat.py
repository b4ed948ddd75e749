"""`clada chat`: a conversation with an engine, a line a turn, that remembers what was said."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from clada_export.cli.options import engine_arguments, generation_arguments, generation_settings, open_engine
from clada_export.cli.shown import visible
from clada_export.cli.token_output import TokenOutput, tell_cut
from clada_export.errors import CladaError, UsageError

if TYPE_CHECKING:
    from clada_export.runtime import Engine

_PROMPT = "> "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; `handler` is what runs it."""
    parser.set_defaults(handler=run)
    engine_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    generation_arguments(parser, new_tokens=512)
    parser.add_argument("--quiet", action="store_true", help="only the model's messages")


def run(options: argparse.Namespace) -> int:
    """Returns the exit code.

    Raises:
        CladaError: what a user has to know; it has the exit code. On a terminal, after the first answer, an error is told and
            the conversation goes on without that turn.
    """
    from clada_export.runtime.tokens import require_text

    messages = []
    if options.system is not None:
        require_text(options.system, "--system")
        messages.append({"role": "system", "content": options.system})
    interactive = sys.stdin.isatty()
    engine = open_engine(options)
    if interactive and not options.quiet:
        print("a line a turn; Ctrl-C stops an answer, Ctrl-D ends the conversation", file=sys.stderr)
    TokenOutput(show_load=options.show_load, quiet=options.quiet).begin()
    answered = False
    for line in _lines(interactive):
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": _answer(engine, messages, options, interactive)})
        except CladaError as error:
            if not (interactive and answered):
                raise
            messages.pop()
            print(f"error: {visible(str(error))}; this turn is forgotten", file=sys.stderr)
        answered = True
    return 0


def _answer(engine: Engine, messages: list[dict[str, str]], options: argparse.Namespace, interactive: bool) -> str:
    """Write the model's next message, and give it back."""
    with engine.stream_chat(messages, options.max_new_tokens, **generation_settings(options)) as stream:
        output = TokenOutput(show_load=options.show_load, quiet=options.quiet)
        try:
            output.write(stream)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print(flush=True)
    if stream.tokens:
        output.loads()
    tell_cut(engine, stream.finish, len(stream.tokens), quiet=options.quiet)
    return stream.text


def _lines(interactive: bool) -> Iterator[str]:
    """What the user says: lines that are not empty, up to the end of stdin."""
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401 - lets `input` edit lines, where the interpreter has it
    number = 0
    while True:
        number += 1
        try:
            line = _line(interactive)
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin: line {number} is no UTF-8 text: {error}") from error
        except EOFError:
            if interactive:
                print(file=sys.stderr)
            return
        if line.strip():
            yield line


def _line(interactive: bool) -> str:
    if interactive and sys.stdout.isatty():
        return input(_PROMPT)
    if interactive:
        print(_PROMPT, end="", file=sys.stderr, flush=True)
    raw = sys.stdin.buffer.readline()
    if not raw:
        raise EOFError
    return raw.decode().rstrip("\r\n")
