"""Engines side by side: ours, llama.cpp's and onnxruntime-genai's, each with its speed and its quality.

    python -m benchmarks.peers build MODEL --work build/peers ...    # make the peers from the model's full-precision weights
    python -m benchmarks.peers measure MODEL --engine NAME=KIND:PATH[@LOAD] ...

MODEL is a folder of Hugging Face files. KIND is clada (an engine folder; LOAD is auto, dense or a number), llama (a GGUF file)
or genai (a folder). What is done is kept in the work folder, engine by engine and round by round, so a run that was cut off
goes on where it stood. Measure speed on a quiet machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.decode import RESULTS, Cache, say, write_json
from benchmarks.peers.build import GENAI_PRECISIONS, LLAMA_TYPES, build_genai, build_llama
from benchmarks.peers.client import Contestant, Worker
from benchmarks.peers.page import write_page
from benchmarks.peers.race import Rounds, race, summary
from benchmarks.peers.score import quality, reference_logits
from benchmarks.peers.worker import KINDS
from benchmarks.quality import PROMPT, Windows, cut
from benchmarks.texts import heldout_texts
from clada_export.errors import CladaError, UsageError
from clada_export.source.load import load_source

FORMAT = 1


def contestant(text: str, pythons: dict[str, str]) -> Contestant:
    """NAME=KIND:PATH[@LOAD].

    Raises:
        UsageError: it is not of that form.
    """
    name, _, rest = text.partition("=")
    kind, _, place = rest.partition(":")
    path, _, load = place.partition("@")
    if not name or kind not in KINDS or not path or (load and kind != "clada"):
        known = ", ".join(kind for kind in KINDS if kind != "reference")
        raise UsageError(
            f"engine {text!r}: wanted NAME=KIND:PATH, KIND one of {known}; and @LOAD behind the path of a clada engine"
        )
    return Contestant(name, kind, path, pythons.get(kind, sys.executable), load or "auto")


def weigh(path: str) -> int:
    """Bytes of a file, or of all files in a folder."""
    place = Path(path)
    return sum(each.stat().st_size for each in ([place] if place.is_file() else place.rglob("*")) if each.is_file())


def windows_of(model: str, options: argparse.Namespace) -> tuple[list[Windows], list[list[int]]]:
    """The held-out windows, and the tokens of the whole texts."""
    tokenizer: Any = load_source(model).tokenizer
    if tokenizer is None:
        raise UsageError(f"{model}: the model has no tokenizer, and the benchmark needs one for real text")
    texts = heldout_texts(options.work / "texts", options.text)
    ids = [tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    cuts = [
        cut(text.name, text.digest, row, options.windows, options.window_tokens) for text, row in zip(texts, ids, strict=True)
    ]
    return cuts, ids


def prompts_of(ids: Sequence[Sequence[int]], length: int, rounds: int) -> list[Sequence[int]]:
    """A prompt for a warm-up and for each round, from the texts in turn."""
    found = []
    for number in range(rounds + 1):
        text = ids[number % len(ids)]
        start = (len(text) - length) * number // (rounds + 1)
        found.append(text[start : start + length])
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Quality of each engine, then the speed of all."""
    pythons = {"llama": options.llama_python, "genai": options.genai_python}
    contestants = [contestant(text, pythons) for text in options.engine]
    name = options.name or Path(options.model.rstrip("/")).name
    cache = Cache(options.work / name, options.fresh)
    windows, ids = windows_of(options.model, options)
    about = {"texts": [text.to_dict() for text in windows], "prompt": PROMPT, "model": name}
    folder = cache.folder / ("reference-" + hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12])
    if "quality" in options.parts:
        with Worker(Contestant("the model", "reference", options.model, sys.executable), options.threads) as worker:
            reference_logits(worker, windows, folder)
    records = []
    for each in contestants:
        record: dict[str, Any] = {"name": each.name, "kind": each.kind, "load": each.load, "bytes": weigh(each.path)}
        if "quality" in options.parts:
            record["quality"] = _quality(cache, each, windows, folder, about, options.threads)
        records.append(record)
    if "speed" in options.parts:
        rounds = _speed(cache, contestants, ids, options)
        for record in records:
            record["speed"] = summary(rounds[record["name"]])
    return {
        "benchmark": "peers",
        "format": FORMAT,
        "model": name,
        "settings": {"new_tokens": options.new_tokens, "rounds": options.rounds, "scored_after": PROMPT},
        **environment.describe(options.threads),
        "texts": about["texts"],
        "engines": records,
    }


def _quality(
    cache: Cache, each: Contestant, windows: Sequence[Windows], folder: Path, about: dict[str, Any], threads: int
) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        say(f"quality: {each.name}")
        with Worker(each, threads) as worker:
            return quality(worker, windows, folder, lambda done, wanted: say(f"quality, {each.name}: {done}/{wanted} windows"))

    key = {**about, **each.to_dict(), "bytes": weigh(each.path), "changed": _changed(each.path)}
    return cache.get("quality", _slug(each.name), key, make)


def _speed(
    cache: Cache, contestants: Sequence[Contestant], ids: Sequence[Sequence[int]], options: argparse.Namespace
) -> dict[str, Rounds]:
    """Rounds by engine; those that an earlier run kept are of the same engines, prompts and threads."""
    path = cache.folder / "speed.json"
    settings = [options.threads, options.new_tokens, options.rounds, sorted(options.prompt_tokens)]
    kept = json.loads(path.read_text()) if path.is_file() and "speed" not in options.fresh else {}
    keys = {each.name: str([*settings, each.to_dict(), weigh(each.path), _changed(each.path)]) for each in contestants}
    done: dict[str, Rounds] = {name: kept[name]["rounds"] for name, key in keys.items() if kept.get(name, {}).get("key") == key}
    prompts = {length: prompts_of(ids, length, options.rounds) for length in options.prompt_tokens}

    def keep() -> None:
        write_json(path, kept | {name: {"key": keys[name], "rounds": rounds} for name, rounds in done.items()})

    missing = [
        each
        for each in contestants
        if any(len(done.get(each.name, {}).get(str(length), [])) < options.rounds for length in options.prompt_tokens)
    ]
    with ExitStack() as stack:
        workers = {each.name: stack.enter_context(Worker(each, options.threads)) for each in missing}
        race(workers, done, prompts, options.new_tokens, keep, lambda text: say(f"speed, {text}"))
    return done


def _changed(path: str) -> int:
    """When an engine was written, in ns: one that was made anew is another."""
    place = Path(path)
    return max(
        (each.stat().st_mtime_ns for each in ([place] if place.is_file() else place.rglob("*")) if each.is_file()), default=0
    )


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".+-" else "-" for letter in name.lower())


def build(options: argparse.Namespace) -> None:
    """Make the peers that are asked for and missing."""
    options.work.mkdir(parents=True, exist_ok=True)
    if options.llama:
        converter = options.llama_source / "convert_hf_to_gguf.py"
        for path in build_llama(options.model, options.work, options.llama, options.llama_python, converter):
            print(path)
    for path in build_genai(options.model, options.work, options.genai, options.genai_python):
        print(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parts = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("model", help="a folder of Hugging Face files: the full-precision weights")
    common.add_argument(
        "--work", type=Path, default=Path("build/peers"), help="where what is done is kept (default: build/peers)"
    )
    common.add_argument("--llama-python", default=sys.executable, help="the Python that has llama-cpp-python")
    common.add_argument("--genai-python", default=sys.executable, help="the Python that has onnxruntime-genai")
    made = parts.add_parser("build", parents=[common], help="make peers by their own tools")
    made.add_argument("--llama-source", type=Path, help="llama.cpp's sources: the folder with convert_hf_to_gguf.py")
    made.add_argument("--llama", nargs="*", default=[], choices=LLAMA_TYPES, help="GGUF types")
    made.add_argument("--genai", nargs="*", default=[], choices=GENAI_PRECISIONS, help="precisions of its model builder")
    made.set_defaults(run=_build)
    measured = parts.add_parser("measure", parents=[common], help="measure engines, write results and the page")
    measured.add_argument("--engine", action="append", required=True, metavar="NAME=KIND:PATH[@LOAD]", help="again for more")
    measured.add_argument("--name", help="of the model in results (default: the folder's)")
    measured.add_argument("--parts", nargs="+", default=["quality", "speed"], choices=["quality", "speed"])
    measured.add_argument("--fresh", nargs="*", default=[], choices=["quality", "speed"], help="do these parts anew")
    measured.add_argument("--threads", type=int, default=2)
    measured.add_argument("--rounds", type=int, default=6)
    measured.add_argument("--prompt-tokens", nargs="+", type=int, default=[128, 512])
    measured.add_argument("--new-tokens", type=int, default=48)
    measured.add_argument("--windows", type=int, default=2, help="of each held-out text")
    measured.add_argument("--window-tokens", type=int, default=512)
    measured.add_argument("--text", action="append", type=Path, default=[], help="a held-out text; again for more")
    measured.add_argument("--results", type=Path, default=RESULTS, help="where peers-NAME.json goes")
    measured.set_defaults(run=_measure)
    return parser


def _build(options: argparse.Namespace) -> None:
    if options.llama and options.llama_source is None:
        raise UsageError("--llama needs --llama-source, the folder with convert_hf_to_gguf.py")
    build(options)


def _measure(options: argparse.Namespace) -> None:
    if busy := environment.busy():
        say(f"load average: {busy:.2f} a core")
    result = measure(options)
    path = options.results / f"peers-{result['model']}.json"
    write_json(path, result)
    say(f"written: {path}")
    if options.results.resolve() == RESULTS.resolve():
        write_page(say=say)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except CladaError as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
