"""`clada export`, which is also `clada-export`: compile a model."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from clada_export.cli.options import (
    calibration_arguments,
    hub_arguments,
    hub_options,
    output_arguments,
    policy_arguments,
    policy_settings,
    workers_arguments,
)
from clada_export.console import ConsoleProgress
from clada_export.errors import UsageError
from clada_export.plan.goal import DEFAULT_BUDGET


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; `handler` is what runs it."""
    parser.set_defaults(handler=run)
    parser.add_argument("model", metavar="MODEL", help="a Hub id, a folder with safetensors, a .gguf file, or an ONNX model")
    parser.add_argument(
        "--target",
        required=True,
        metavar="{ort,trt}",
        help="ort: ONNX Runtime on the CPU; trt: TensorRT or TensorRT-RTX on NVIDIA GPUs",
    )
    parser.add_argument("-o", "--output", type=Path, help="the folder to make (default: MODEL's name with -clada-TARGET)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--policy", default="clada", help="which method picks neurons; auto measures all (default: clada)")
    parser.add_argument("--train", action="store_true", help="--policy auto: also policies that train routers")
    policy_arguments(parser)
    parser.add_argument(
        "--prune",
        metavar="SPEC",
        help="prune weights first: METHOD=0.5, METHOD=2:4 or METHOD=neurons:0.25; an unknown METHOD lists those there are",
    )
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument(
        "--budget",
        default=DEFAULT_BUDGET,
        help="allowed error, ppl=2%%, kl=0.05, both with a comma between, or cett=0.2 (default: %(default)s)",
    )
    goal.add_argument("--sparsity", type=float, help="a mean sparsity instead of a budget, like 0.5")
    goal.add_argument("--plan", type=Path, help="a sparsity plan made before; no calibration")
    parser.add_argument(
        "--weights",
        metavar="FORM",
        help="of the engine: float32, bfloat16, float16, int8, int6, int5, int4, or auto, the fastest of the intN within the "
        "budget (default: float32)",
    )
    calibration_arguments(parser)
    # An older word for the forms that are types.
    parser.set_defaults(dtype=None)
    workers_arguments(parser)
    parser.add_argument(
        "--portable",
        action="store_true",
        help="--target ort: leave attention in standard operators, for ONNX Runtime on a GPU and for other runtimes; slower on "
        "the CPU",
    )
    parser.add_argument("--no-load-response", action="store_true", help="do not fit a response to surprisal and entropy")
    parser.add_argument("--no-verify", action="store_true", help="skip verification; the manifest says so")
    _tensorrt_arguments(parser.add_argument_group("with --target trt"))
    hub_arguments(parser)
    output_arguments(parser)


def _tensorrt_arguments(group: argparse._ArgumentGroup) -> None:
    """The fields of `TensorRTOptions`, by their names; what is not given is not in the namespace."""

    def add(name: str, **settings: Any) -> None:
        group.add_argument(name, default=argparse.SUPPRESS, **settings)

    add("--max-batch", type=int, metavar="N", help="sequences in a batch (default: 1)")
    add("--max-sequence", type=int, metavar="N", help="prompt tokens in one run; longer prompts run in parts (default: 512)")
    add("--max-past", type=int, metavar="N", help="tokens in the cache (default: 2048, or what the model takes)")
    add(
        "--compute-capability",
        dest="compute_capabilities",
        nargs="+",
        metavar="X.Y",
        help="GPUs that a TensorRT-RTX engine is for (default: 8.0 8.6 8.9 12.0)",
    )
    add("--no-plugin", dest="plugin", action="store_false", help="build the op from standard layers: dense, no library needed")
    add("--embed-plugin", action="store_true", help="put the plugin library into the engine file")
    add("--refit", action="store_true", help="an engine whose weights can be replaced (TensorRT-RTX: needs a GPU)")
    add("--weight-streaming", action="store_true", help="an engine whose weights need not all fit into GPU memory")
    add("--timing-cache", type=Path, metavar="FILE", help="keep timings between builds (classic TensorRT)")


def _tensorrt_options(options: argparse.Namespace) -> Any:
    """The options of TensorRT that were given, or None."""
    from clada_export.targets.options import TensorRTOptions

    given = {field.name: getattr(options, field.name) for field in fields(TensorRTOptions) if hasattr(options, field.name)}
    if "compute_capabilities" in given:
        given["compute_capabilities"] = tuple(given["compute_capabilities"])
    return TensorRTOptions(**given) if given else None


def run(options: argparse.Namespace) -> int:
    """Returns the exit code.

    Raises:
        CladaError: what a user has to know; it has the exit code.
    """
    from clada_export.calibration.cache import parse_cache_folder
    from clada_export.export_options import ExportOptions
    from clada_export.pipeline import export

    if options.dtype is not None and options.weights not in (None, options.dtype):
        raise UsageError(f"--weights {options.weights} and --dtype {options.dtype} contradict each other; give --weights alone")
    output = options.output or Path(f"{Path(options.model.rstrip('/')).stem}-clada-{options.target}")
    progress = ConsoleProgress(quiet=options.quiet)
    try:
        result = export(
            options.model,
            output,
            ExportOptions(
                target=options.target,
                tensorrt=_tensorrt_options(options),
                policy=options.policy,
                train=options.train,
                settings=policy_settings(options),
                budget=options.budget,
                sparsity=options.sparsity,
                prune=options.prune,
                plan=options.plan,
                calibration_data=options.calibration_data,
                calibration_tokens=options.calibration_tokens,
                calibration_context=options.calibration_context,
                calibration_cache=parse_cache_folder(options.calibration_cache),
                calibration_workers=options.calibration_workers,
                calibration_threads=options.calibration_threads,
                ray_address=options.ray_address,
                dtype=options.dtype or "float32",
                weights=options.weights,
                load_response=not options.no_load_response,
                portable=options.portable,
                verify=not options.no_verify,
                overwrite=options.overwrite,
                seed=options.seed,
                **hub_options(options),
            ),
            progress=progress,
        )
    finally:
        progress.stop()
    for warning in result.manifest.warnings:
        progress.warn(warning)
    commands = (result.manifest.engine or {}).get("commands", {})
    for tool, command in commands.items():
        progress.tell(f"{tool}, in {result.path}:\n    {command}")
    if options.json:
        print(
            json.dumps(
                {
                    "path": str(result.path),
                    "sparsity": result.plan.expected_sparsity,
                    "layers": len(result.plan.layers),
                    "verified": result.verification is not None,
                    "deferred": result.verification.deferred if result.verification is not None else [],
                    "commands": commands,
                    "drift": result.manifest.drift,
                    "warnings": list(result.manifest.warnings),
                    "seconds": result.timings,
                }
            )
        )
    else:
        print(result.path)
    return 0
