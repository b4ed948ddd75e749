"""`clada load-experiment`: measure whether a response to the load helps a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from clada_export.cli.options import hub_arguments, hub_options, output_arguments
from clada_export.console import ConsoleProgress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; `handler` is what runs it."""
    parser.set_defaults(handler=run)
    parser.add_argument("model", metavar="MODEL", help="a Hub id, a folder with safetensors, a .gguf file, or an ONNX model")
    parser.add_argument("-o", "--output", type=Path, help="the folder for the results (default: MODEL's name with -load)")
    parser.add_argument("--sparsity", type=float, default=0.5, help="mean share of neurons that every arm skips (default: 0.5)")
    parser.add_argument("--documents", type=int, default=6, metavar="N", help="documents of each text (default: 6)")
    parser.add_argument("--context", type=int, default=256, metavar="N", help="tokens of a document (default: 256)")
    parser.add_argument(
        "--text", type=Path, action="append", metavar="FILE", help="held-out text (default: of the calibration text)"
    )
    parser.add_argument("--no-generated", action="store_true", help="leave out texts that the model writes")
    parser.add_argument("--group", action="append", help="only these groups of arms; give it again for more")
    parser.add_argument("--score", help="shadow, gate or exact (default: shadow where it fits, else gate)")
    parser.add_argument("--calibration-data", type=Path, metavar="FILE", help="a UTF-8 text")
    parser.add_argument("--calibration-tokens", type=Path, metavar="FILE", help="token ids as .npy")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    hub_arguments(parser)
    output_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Returns the exit code.

    Raises:
        CladaError: what a user has to know; it has the exit code.
    """
    from clada_export.lab.load_experiment import ExperimentOptions, run_experiment
    from clada_export.lab.load_experiment.report import save

    output = options.output or Path(f"{Path(options.model.rstrip('/')).stem}-load")
    progress = ConsoleProgress(quiet=options.quiet)
    try:
        result = run_experiment(
            options.model,
            ExperimentOptions(
                sparsity=options.sparsity,
                documents=options.documents,
                context=options.context,
                texts=tuple(options.text or ()),
                generated=not options.no_generated,
                groups=tuple(options.group or ()),
                score=options.score,
                calibration_data=options.calibration_data,
                calibration_tokens=options.calibration_tokens,
                seed=options.seed,
            ),
            progress=progress,
            **hub_options(options),
        )
    finally:
        progress.stop()
    save(result, output, progress.tell)
    print(json.dumps(result) if options.json else output)
    return 0
