"""`clada verify`: check an engine against its source model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from clada_export.cli.options import hub_arguments, hub_options, output_arguments
from clada_export.console import ConsoleProgress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; `handler` is what runs it."""
    parser.set_defaults(handler=run)
    parser.add_argument("folder", type=Path, metavar="OUT", help="what clada-export wrote")
    parser.add_argument(
        "--source",
        help="where the source model is (default: what was saved at export, or else the Hub id in the manifest)",
    )
    parser.add_argument(
        "--calibration-data", type=Path, metavar="FILE", help="the export's calibration text; needed if weights were pruned"
    )
    hub_arguments(parser)
    output_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Returns the exit code.

    Raises:
        CladaError: what a user has to know; it has the exit code.
    """
    from clada_export.errors import VerificationError
    from clada_export.pipeline import verify_folder

    progress = ConsoleProgress(quiet=options.quiet)
    hub = {name: value for name, value in hub_options(options).items() if value}
    try:
        result = verify_folder(
            options.folder, options.source, calibration_data=options.calibration_data, progress=progress, **hub
        )
    finally:
        progress.stop()
    if options.json:
        print(json.dumps(result.to_dict()))
    else:
        for check in result.checks:
            print(f"[{'✓' if check.passed else '✗'}] {check.name}{'  ' + check.why if check.why else ''}")
    if not result.passed:
        raise VerificationError("verification failed:\n  " + "\n  ".join(result.failures()))
    return 0
