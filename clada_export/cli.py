"""The command line. stdout carries the result, stderr everything else; exit codes as in `clada_export.errors`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from clada_export import __version__
from clada_export.console import ConsoleProgress
from clada_export.errors import CladaError, UsageError

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """`clada COMMAND ...`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="clada", description="Compile and run sparse decoder engines.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"clada-export {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _export_arguments(commands.add_parser("export", help="compile a model (the same as clada-export)", allow_abbrev=False))
    _verify_arguments(commands.add_parser("verify", help="check an engine against its source model", allow_abbrev=False))
    _run_arguments(commands.add_parser("run", help="generate text with an engine", allow_abbrev=False))
    _bench_arguments(commands.add_parser("bench", help="time an engine, dense against sparse", allow_abbrev=False))
    _sweep_arguments(commands.add_parser("sweep", help="measure policies at several sparsities", allow_abbrev=False))
    _inspect_arguments(commands.add_parser("inspect", help="show what an engine is", allow_abbrev=False))
    _load_experiment_arguments(
        commands.add_parser("load-experiment", help="measure whether a response to the load helps a model", allow_abbrev=False)
    )
    return _dispatch(parser.parse_args(arguments))


def main_export(arguments: Sequence[str] | None = None) -> int:
    """`clada-export MODEL ...`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="clada-export",
        description="Compile a Hugging Face decoder into an engine that skips the neurons a token does not need.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"clada-export {__version__}")
    _export_arguments(parser)
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


# --- export ---


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=_export)
    parser.add_argument("model", metavar="MODEL", help="a Hub id, a folder with safetensors, or a .gguf file")
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
    _policy_arguments(parser)
    parser.add_argument(
        "--prune", metavar="SPEC", help="prune weights first: wanda=0.5, sparsegpt=2:4, wanda=neurons:0.25, ..."
    )
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--budget", default="ppl=2%", help="allowed error, ppl=2%%, kl=0.05 or cett=0.2 (default: ppl=2%%)")
    goal.add_argument("--sparsity", type=float, help="a mean sparsity instead of a budget, like 0.5")
    goal.add_argument("--plan", type=Path, help="a sparsity plan made before; no calibration")
    _calibration_arguments(parser)
    parser.add_argument("--no-load-response", action="store_true", help="do not fit a response to surprisal and entropy")
    parser.add_argument("--no-verify", action="store_true", help="skip verification; the manifest says so")
    _tensorrt_arguments(parser.add_argument_group("with --target trt"))
    _hub_arguments(parser)
    _output_arguments(parser)


def _calibration_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration-data", type=Path, metavar="FILE", help="a UTF-8 text (default: a text that comes with Python)"
    )
    parser.add_argument(
        "--calibration-tokens", type=Path, metavar="FILE", help="token ids as .npy, for models without a tokenizer"
    )
    parser.add_argument("--calibration-context", type=int, default=512, metavar="N", help="tokens a window (default: 512)")
    parser.add_argument(
        "--calibration-cache",
        metavar="DIR",
        help="where calibration keeps what it computed, none for nowhere (default: ~/.cache/clada-export)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="float32, float16 or bfloat16: with ort the type of the FFN weights, with trt of the model (default: float32)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")


def _policy_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of `PolicySettings`, by their names; what is not given is not in the namespace."""

    def add(name: str, **settings: Any) -> None:
        parser.add_argument(name, default=argparse.SUPPRESS, **settings)

    add("--score", help="the policy's score: shadow, gate, exact (default: the policy's choice)")
    add("--allocation", help="how layers share: cett, sparsity, level, sensitivity, fisher (default: the best measured)")
    add("--no-prior", dest="prior", action="store_false", help="clada: do not weigh thresholds by the prompt statistic")
    add("--granule", type=int, metavar="N", help="neurons of an expert (default: the policy's)")
    add("--rank", type=int, metavar="N", help="dejavu: width of the predictor (default: 4%% of the neurons); of --finetune (8)")
    add("--finetune", action="store_true", help="lte: train low-rank changes of the FFN weights along with the routers")
    add("--pattern", help="wanda, sparsegpt: unstructured (default), n:m like 2:4, or neurons")
    add("--rows", type=int, metavar="N", help="token rows that routers are trained on (default: 2048)")


def _policy_settings(options: argparse.Namespace) -> Any:
    from clada_export.policies import PolicySettings

    given = {field.name: getattr(options, field.name) for field in fields(PolicySettings) if hasattr(options, field.name)}
    return PolicySettings(**given)


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


def _hub_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--token", help="Hub access token")
    parser.add_argument("--cache-dir", help="where Hub files are kept")
    parser.add_argument("--local-files-only", action="store_true", help="never use the network")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--allow-pickle", action="store_true", help="accept pickled weights (pytorch_model.bin)")


def _output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _export(options: argparse.Namespace) -> int:
    from clada_export.calibration.cache import parse_cache_folder
    from clada_export.export_options import ExportOptions
    from clada_export.pipeline import export

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
                settings=_policy_settings(options),
                budget=options.budget,
                sparsity=options.sparsity,
                prune=options.prune,
                plan=options.plan,
                calibration_data=options.calibration_data,
                calibration_tokens=options.calibration_tokens,
                calibration_context=options.calibration_context,
                calibration_cache=parse_cache_folder(options.calibration_cache),
                dtype=options.dtype,
                load_response=not options.no_load_response,
                verify=not options.no_verify,
                overwrite=options.overwrite,
                seed=options.seed,
                **_hub_options(options),
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


def _hub_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "allow_pickle")
    return {name: getattr(options, name) for name in names}


# --- sweep ---


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=_sweep)
    parser.add_argument("model", metavar="MODEL", help="a Hub id, a folder with safetensors, or a .gguf file")
    parser.add_argument("--policies", required=True, metavar="A,B,...", help="policies with commas between")
    parser.add_argument("--sparsities", required=True, metavar="S,T,...", help="mean sparsities with commas between")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="its folder (default: MODEL's name with -sweep)")
    parser.add_argument("--ray-address", metavar="A", help="of a running Ray cluster (default: Ray on this machine)")
    parser.add_argument("--workers", type=int, metavar="N", help="cells at once; 0: in this process (default: the cores)")
    parser.add_argument("--threads", type=int, metavar="N", help="of a worker (default: the cores, shared out)")
    parser.add_argument("--retries", type=int, default=2, metavar="N", help="of a cell whose worker died (default: 2)")
    parser.add_argument("--load-response", action="store_true", help="fit a response to the load, as an export does")
    _policy_arguments(parser)
    _calibration_arguments(parser)
    _hub_arguments(parser)
    _output_arguments(parser)


def _sweep(options: argparse.Namespace) -> int:
    from clada_export.sweep.command import run_command

    return run_command(options, _policy_settings(options), _hub_options(options))


# --- verify ---


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=_verify)
    parser.add_argument("folder", type=Path, metavar="OUT", help="what clada-export wrote")
    parser.add_argument(
        "--source",
        help="where the source model is (default: what was saved at export, or else the Hub id in the manifest)",
    )
    parser.add_argument(
        "--calibration-data", type=Path, metavar="FILE", help="the export's calibration text; needed if weights were pruned"
    )
    _hub_arguments(parser)
    _output_arguments(parser)


def _verify(options: argparse.Namespace) -> int:
    from clada_export.errors import VerificationError
    from clada_export.pipeline import verify_folder

    progress = ConsoleProgress(quiet=options.quiet)
    hub = {name: value for name, value in _hub_options(options).items() if value}
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


# --- run ---


def _load(text: str) -> Any:
    if text in ("auto", "dense"):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, dense or a number") from None


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=_run)
    parser.add_argument("folder", type=Path, metavar="OUT", help="what clada-export wrote")
    parser.add_argument("--prompt", action="append", required=True, help="a text; give it again for a batch")
    parser.add_argument("--chat", action="store_true", help="the prompts are user messages: use the model's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument(
        "--load", type=_load, default="auto", help="auto (follow the text), dense, or a number: higher is denser"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None)
    _output_arguments(parser)


def _run(options: argparse.Namespace) -> int:
    from clada_export.runtime import load_engine

    engine = load_engine(options.folder, threads=options.threads)
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


# --- bench ---


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=_bench)
    parser.add_argument("folder", type=Path, metavar="OUT", help="what clada-export wrote")
    parser.add_argument("--load", type=_load, action="append", help="loads to time (default: dense and auto)")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=None)
    _output_arguments(parser)


def _bench(options: argparse.Namespace) -> int:
    from clada_export.bench import bench
    from clada_export.runtime import load_engine

    engine = load_engine(options.folder, threads=options.threads)
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
    print(f"{'load':>8} {'tokens/s':>9} {'ITL p50':>9} {'p90':>7} {'p99':>7} {'TTFT':>8} {'skipped':>8}")
    for speed in speeds:
        print(
            f"{speed.load:>8} {speed.tokens_per_s:>9.1f} {speed.itl_p50_ms:>6.1f} ms {speed.itl_p90_ms:>7.1f} "
            f"{speed.itl_p99_ms:>7.1f} {speed.ttft_s * 1e3:>5.0f} ms {speed.sparsity:>8.1%}"
        )
    if not options.quiet:
        print(
            "ITL: time between tokens, choosing the token and updating the load included; TTFT: the prompt and its first token",
            file=sys.stderr,
        )
    return 0


# --- inspect ---


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=_inspect)
    parser.add_argument("folder", type=Path, metavar="OUT", help="what clada-export wrote")
    parser.add_argument("--json", action="store_true", help="print the whole manifest")


def _inspect(options: argparse.Namespace) -> int:
    from clada_export.manifest import read_manifest

    manifest = read_manifest(options.folder)
    if options.json:
        print(json.dumps(manifest.to_dict(), indent=2))
        return 0
    plan, source, op, drift = manifest.sparsity_plan(), manifest.source, manifest.op, manifest.drift
    signal, budget = plan.load, plan.calibration.get("budget", "given")
    revision = f", {source['revision']}" if source["revision"] else ""
    print(f"model     {source['name']} ({source['kind']}{revision})")
    stored = "FFN weights" if manifest.engine is None else "model"
    print(f"target    {manifest.target}, {stored} {manifest.dtype}, {op['domain']}::{op['name']} version {op['version']}")
    if manifest.engine is not None:
        _inspect_engine(manifest.engine)
    print(f"plan      policy {plan.policy}, score {plan.score}, rule {plan.rule}, budget {budget}")
    if plan.prune is not None:
        print(f"pruned    {plan.prune}")
    if (read := plan.calibration.get("relative_bytes")) is not None:
        print(f"reads     {read:.2f} of the dense FFNs' bytes for a token at load 0")
    print(
        f"load      {signal.surprisal_weight:g} * (S - {signal.surprisal_mean:.3f}) / {signal.surprisal_std:.3f}"
        f" + {signal.entropy_weight:g} * (H - {signal.entropy_mean:.3f}) / {signal.entropy_std:.3f}  (nats)"
    )
    if signal.rule != "exp" or signal.momentum:
        given = "".join(f", {name} {value:g}" for name, value in signal.parameters.items())
        print(f"          rule {signal.rule}{given}; momentum {signal.momentum:g}")
    if drift:
        print(
            f"drift     perplexity {drift['ppl_increase']:+.2%}, KL {drift['kl']:.4f} nats, top-1 {drift['top1']:.1%}"
            f" on {drift['tokens']} tokens"
        )
    print(f"sparsity  {plan.expected_sparsity:.1%} expected at load 0\n")
    print(f"{'layer':<44} {'activation':<10} {'d x f':>13} {'threshold':>10} {'skipped':>8} {'CETT':>6}")
    for layer in plan.layers:
        threshold = f"{layer.threshold[0]:.4g}" if len(layer.threshold) == 1 else f"[{len(layer.threshold)}]"
        kind = layer.activation + ("*" if layer.gated else "")
        sizes = f"{layer.hidden_size} x {layer.intermediate_size}"
        shares = f"{layer.expected_sparsity:>8.1%} {layer.expected_cett:>6.3f}"
        print(f"{layer.name:<44} {kind:<10} {sizes:>13} {threshold:>10} {shares}")
    print("(* gated)")
    for warning in manifest.warnings:
        print(f"warning: {warning}")
    return 0


def _inspect_engine(engine: dict[str, Any]) -> None:
    plugin = engine["plugin"]
    held = "embedded in the engine" if plugin and plugin["embedded"] else f"in {plugin['file']}" if plugin else ""
    layers = f"{plugin['layers']} plugin layers, {held}" if plugin else "no plugin: dense arithmetic"
    for file in engine["files"]:
        print(f"engine    {file['file']} for compute capability {', '.join(file['compute_capabilities'])}")
    print(f"          {engine['package']} {engine['version']}; {layers}")
    for profile in engine["profiles"]:
        sizes = ", ".join(f"{key} {profile[key][0]}..{profile[key][2]}" for key in ("batch", "sequence", "past"))
        print(f"profile   {profile['name']}: {sizes}")


# --- load-experiment ---


def _load_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=_load_experiment)
    parser.add_argument("model", metavar="MODEL", help="a Hub id, a folder with safetensors, or a .gguf file")
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
    _hub_arguments(parser)
    _output_arguments(parser)


def _load_experiment(options: argparse.Namespace) -> int:
    from clada_export.load_experiment import ExperimentOptions, run_experiment
    from clada_export.load_experiment.report import save

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
            **_hub_options(options),
        )
    finally:
        progress.stop()
    save(result, output, progress.tell)
    print(json.dumps(result) if options.json else output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
