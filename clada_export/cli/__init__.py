"""The command line: one module a command. stdout carries the result, stderr everything else; exit codes as in
`clada_export.errors`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from clada_export import __version__
from clada_export.cli import bench, export, inspect, load_experiment, run, sweep, verify
from clada_export.errors import CladaError

INTERRUPTED = 130

AddArguments = Callable[[argparse.ArgumentParser], None]

COMMANDS: dict[str, tuple[str, AddArguments]] = {
    "export": ("compile a model (the same as clada-export)", export.add_arguments),
    "verify": ("check an engine against its source model", verify.add_arguments),
    "run": ("generate text with an engine", run.add_arguments),
    "bench": ("time an engine, dense against sparse", bench.add_arguments),
    "sweep": ("measure policies at several sparsities", sweep.add_arguments),
    "inspect": ("show what an engine is", inspect.add_arguments),
    "load-experiment": ("measure whether a response to the load helps a model", load_experiment.add_arguments),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """`clada COMMAND ...`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="clada", description="Compile and run sparse decoder engines.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"clada-export {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_arguments) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=text, allow_abbrev=False))
    return _dispatch(parser.parse_args(arguments))


def main_export(arguments: Sequence[str] | None = None) -> int:
    """`clada-export MODEL ...`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="clada-export",
        description="Compile a Hugging Face decoder into an engine that skips the neurons a token does not need.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"clada-export {__version__}")
    export.add_arguments(parser)
    return _dispatch(parser.parse_args(arguments))


def _dispatch(options: argparse.Namespace) -> int:
    handler: Callable[[argparse.Namespace], int] = options.handler
    try:
        return handler(options)
    except CladaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has gone (`clada run ... | head`): nothing more to say, and nothing may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # The last line of defence: anything else is our fault and says so.
        if os.environ.get("CLADA_DEBUG"):
            traceback.print_exc()
        print(
            f"internal error: {type(error).__name__}: {error}\nThis is a fault of clada-export; run again with CLADA_DEBUG=1 "
            "for the traceback and report it",
            file=sys.stderr,
        )
        return 1
