"""`clada sweep`: measure policies at several sparsities."""

from __future__ import annotations

import argparse
from pathlib import Path

from clada_export.cli.options import (
    calibration_arguments,
    hub_arguments,
    hub_options,
    output_arguments,
    policy_arguments,
    policy_settings,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; `handler` is what runs it."""
    parser.set_defaults(handler=run)
    parser.add_argument("model", metavar="MODEL", help="a Hub id, a folder with safetensors, a .gguf file, or an ONNX model")
    parser.add_argument("--policies", required=True, metavar="A,B,...", help="policies with commas between")
    parser.add_argument("--sparsities", required=True, metavar="S,T,...", help="mean sparsities with commas between")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="its folder (default: MODEL's name with -sweep)")
    parser.add_argument("--ray-address", metavar="A", help="of a running Ray cluster (default: Ray on this machine)")
    parser.add_argument("--workers", type=int, metavar="N", help="cells at once; 0: in this process (default: the cores)")
    parser.add_argument("--threads", type=int, metavar="N", help="of a worker (default: the cores, shared out)")
    parser.add_argument("--retries", type=int, default=2, metavar="N", help="of a cell whose worker died (default: 2)")
    parser.add_argument("--load-response", action="store_true", help="fit a response to the load, as an export does")
    policy_arguments(parser)
    calibration_arguments(parser)
    hub_arguments(parser)
    output_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Returns the exit code.

    Raises:
        CladaError: what a user has to know; it has the exit code.
    """
    from clada_export.lab.sweep.command import run_command

    return run_command(options, policy_settings(options), hub_options(options))
