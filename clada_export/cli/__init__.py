"""The command line: one module a command. stdout carries the result, stderr everything else; exit codes as in
`clada_export.errors`."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from clada_export import __version__
from clada_export.cli import bench, chat, export, inspect, load_experiment, run, sweep, verify
from clada_export.cli.shown import visible
from clada_export.errors import BackendError, CladaError, UsageError
from clada_export.foreign import DISK_FULL

INTERRUPTED = 130
_KEPT = "\n"
"""Messages may have several lines."""

AddArguments = Callable[[argparse.ArgumentParser], None]

COMMANDS: dict[str, tuple[str, AddArguments]] = {
    "export": ("compile a model (the same as clada-export)", export.add_arguments),
    "verify": ("check an engine against its source model", verify.add_arguments),
    "run": ("generate text with an engine", run.add_arguments),
    "chat": ("talk with an engine", chat.add_arguments),
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
    _escape_what_cannot_be_shown()
    try:
        code = handler(options)
        # Here, and not when the interpreter ends, where nobody could say what went wrong.
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except CladaError as error:
        print(f"error: {visible(str(error), _KEPT)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has gone (`clada run ... | head`): nothing more to say, and nothing may be flushed at exit.
        _discard_stdout()
        return 0
    except MemoryError:
        print("error: memory is exhausted; try a smaller batch, a shorter prompt or a machine with more", file=sys.stderr)
        return BackendError.exit_code
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # The last line of defence: anything else, Rust's panics included, is our fault and says so.
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            _discard_stdout()
            print(f"error: {error.filename or 'the output'}: {error.strerror}; make room and run again", file=sys.stderr)
            return UsageError.exit_code
        if os.environ.get("CLADA_DEBUG"):
            traceback.print_exc()
        print(
            f"internal error: {type(error).__name__}: {visible(str(error), _KEPT)}\nThis is a fault of clada-export; run again "
            "with CLADA_DEBUG=1 for the traceback and report it",
            file=sys.stderr,
        )
        return 1


def _escape_what_cannot_be_shown() -> None:
    """A text may have characters that the terminal's encoding lacks: they come as escapes, and not as an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_stdout() -> None:
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
