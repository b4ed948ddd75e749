"""Options that several commands have, and what they become."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clada_export.runtime import Engine


def calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """What calibration works with."""
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


def workers_arguments(parser: argparse.ArgumentParser) -> None:
    """Where calibration runs."""
    parser.add_argument(
        "--calibration-workers",
        type=int,
        default=0,
        metavar="N",
        help="processes on Ray that measure calibration's windows, each with the model (default: 0, this process alone)",
    )
    parser.add_argument(
        "--calibration-threads",
        type=int,
        metavar="N",
        help="of a process that calibrates (default: the cores, shared out among workers of this machine)",
    )
    parser.add_argument("--ray-address", metavar="A", help="of a running Ray cluster for the workers (default: this machine)")


def policy_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of `PolicySettings`, by their names; what is not given is not in the namespace."""

    def add(name: str, **settings: Any) -> None:
        parser.add_argument(name, default=argparse.SUPPRESS, **settings)

    add("--score", help="the policy's score: shadow, gate, exact (default: the policy's choice)")
    add("--allocation", help="how layers share: cett, sparsity, level, sensitivity, fisher (default: the best measured)")
    add("--no-prior", dest="prior", action="store_false", help="thresholds are never weighed by the prompt statistic")
    add("--granule", type=int, metavar="N", help="neurons of an expert (default: the policy's)")
    add("--rank", type=int, metavar="N", help="width of a predictor, or of what --finetune adds (default: the policy's)")
    add("--finetune", action="store_true", help="train low-rank changes of the FFN weights along with a policy's routers")
    add("--pattern", help="of policies that prune: unstructured (default), n:m like 2:4, or neurons")
    add("--rows", type=int, metavar="N", help="token rows that routers are trained on (default: 2048)")


def policy_settings(options: argparse.Namespace) -> Any:
    """The `PolicySettings` that were given."""
    from clada_export.methods import PolicySettings

    given = {field.name: getattr(options, field.name) for field in fields(PolicySettings) if hasattr(options, field.name)}
    return PolicySettings(**given)


def hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the model comes from."""
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--token", help="Hub access token")
    parser.add_argument("--cache-dir", help="where Hub files are kept")
    parser.add_argument("--local-files-only", action="store_true", help="never use the network")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--allow-pickle", action="store_true", help="accept pickled weights (pytorch_model.bin)")


def hub_options(options: argparse.Namespace) -> dict[str, Any]:
    """`hub_arguments` as keyword arguments of `load_source`."""
    names = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "allow_pickle")
    return {name: getattr(options, name) for name in names}


def output_arguments(parser: argparse.ArgumentParser) -> None:
    """How results and progress are shown."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Which engine runs, and how."""
    parser.add_argument("folder", type=Path, metavar="OUT", help="what clada-export wrote")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="ONNX Runtime: on the CPU or an NVIDIA GPU (default: auto, a GPU where onnxruntime-gpu and the op's library are)",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare the files with the manifest (sizes only), nor the library"
    )


def open_engine(options: argparse.Namespace) -> Engine:
    """The engine of `engine_arguments`.

    Raises:
        CladaError: as `load_engine`.
    """
    from clada_export.runtime import load_engine

    return load_engine(options.folder, threads=options.threads, verify_files=not options.no_check, device=options.device)


def generation_arguments(parser: argparse.ArgumentParser, new_tokens: int) -> None:
    """How text is made.

    Args:
        new_tokens: the default.
    """
    parser.add_argument("--max-new-tokens", type=int, default=new_tokens, metavar="N", help=f"at most (default: {new_tokens})")
    parser.add_argument(
        "--load", type=load_value, default="auto", help="auto (follow the text), dense, or a number: higher is denser"
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--sample", dest="do_sample", action="store_true", default=None, help="draw tokens")
    choice.add_argument("--greedy", dest="do_sample", action="store_false", default=None, help="take the best token each time")
    own = "(default: what the model's generation_config.json says"
    parser.add_argument("--temperature", type=float, help=f"0 is greedy, above 0 samples {own}, else greedy)")
    parser.add_argument("--top-k", type=int, metavar="K", help=f"sample from the K best tokens, 0 is off {own}, else off)")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the best tokens of this probability, 1 is off")
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="never sample what has less than P of the best one's probability"
    )
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: lower what was said already; 1 is off")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end where this text appears; give it again for more")
    parser.add_argument(
        "--show-load", action="store_true", help="on a terminal: colour each token by its load and active share"
    )


def generation_settings(options: argparse.Namespace) -> dict[str, Any]:
    """`generation_arguments` as keyword arguments of `Engine.generate`."""
    names = ("load", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    return {name: getattr(options, name) for name in names}


def load_value(text: str) -> Any:
    """A load on the command line: "auto", "dense" or a number."""
    if text in ("auto", "dense"):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, dense or a number") from None
