"""What an export costs: seconds and memory of each stage, in exports as users run them, a process each.

    python -m benchmarks.export_cost                          # every cell that is not there yet, or was another commit's
    python -m benchmarks.export_cost --list                   # their names, and what each needs
    python -m benchmarks.export_cost --cells smollm2 depth-4  # some
    python -m benchmarks.export_cost --qwen model.gguf --cells qwen
    python -m benchmarks.export_cost --page                   # docs/export-cost.md and its picture, from what is recorded

A cell is written to the JSON when it is done, so a run that was cut off goes on; `--again` measures anew. What can't be
measured is recorded with the reason. Beside each measurement stands what `clada inspect` would have said before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, busy, describe
from benchmarks.export_page import write_page
from benchmarks.export_watch import Watched, export_command, parsed, reason, watch
from benchmarks.random_llama import LlamaShape, write_llama
from clada_export.errors import CladaError
from clada_export.files.capacity import available_memory, disk

RESULT = ROOT / "benchmarks" / "results" / "export-cost.json"
NARROW = LlamaShape(hidden=768, intermediate=2048, layers=4, heads=12, kv_heads=12)
WIDE = LlamaShape(hidden=4096, intermediate=11008, layers=2, heads=32, kv_heads=32)
"""That of Llama 2 7B, with fewer layers."""


class MissingError(Exception):
    """What a cell needs is not there; says what."""


@dataclass(frozen=True)
class Settings:
    """Where things are: `work` for models that are made and engines that are measured, `qwen` a GGUF file or None."""

    work: Path
    qwen: Path | None = None
    plan: Path | None = None


@dataclass(frozen=True)
class Cell:
    """A measurement.

    Attributes:
        model: makes or finds the model.
        arguments: of `clada-export`, beside the model and the folder.
        seconds, gigabytes: targets, if there are.
        layers: of a series over depth, which is named before the last hyphen of the cell's name.
        needs: in words.
    """

    name: str
    title: str
    model: Callable[[Settings], Path]
    arguments: tuple[str, ...] = ()
    seconds: float | None = None
    gigabytes: float | None = None
    layers: int | None = None
    planned: bool = False
    needs: str = ""


def _smollm2(settings: Settings) -> Path:
    sys.path.insert(0, str(ROOT / "samples"))
    from quickstart import smollm2  # type: ignore[import-not-found]

    return Path(smollm2())


def _qwen(settings: Settings) -> Path:
    if settings.qwen is None or not settings.qwen.is_file():
        raise MissingError("Qwen2.5-Coder-1.5B as a GGUF file (Q4_K_M) is not fetched; say where it is with --qwen")
    return settings.qwen


def _random(shape: LlamaShape) -> Callable[[Settings], Path]:
    def make(settings: Settings) -> Path:
        # In the types that it is in: the checkpoint, the weights while they are exported, the engine.
        needed = shape.parameters * (2 + 4 + 4)
        free = disk(settings.work).free
        if needed > free:
            raise MissingError(f"{needed / 1e9:.0f} GB of disk are needed in {settings.work}, and {free / 1e9:.0f} GB are free")
        return write_llama(shape, settings.work / shape.key())

    return make


def _cells() -> list[Cell]:
    series = [
        Cell(
            f"depth-{layers}",
            f"random Llama {NARROW.hidden} x {NARROW.intermediate}, {layers} layers",
            _random(replace(NARROW, layers=layers)),
            ("--sparsity", "0.5", "--calibration-context", "256"),
            layers=layers,
        )
        for layers in (4, 8, 16, 32)
    ]
    wide = [
        Cell(
            f"7b-{layers}",
            f"random Llama of 7B's shape ({WIDE.hidden} x {WIDE.intermediate}), {layers} layers, bfloat16",
            _random(replace(WIDE, layers=layers)),
            ("--sparsity", "0.5", "--calibration-context", "64"),
            layers=layers,
            needs=f"{replace(WIDE, layers=layers).parameters * 10 / 1e9:.0f} GB of disk",
        )
        for layers in (2, 4, 8)
    ]
    given = "the plan of cell smollm2, or one with --plan"
    return [
        Cell("smollm2", "SmolLM2-135M, whole", _smollm2, (), 60.0, 1.5),
        Cell("smollm2-auto", "SmolLM2-135M, whole, `--policy auto`", _smollm2, ("--policy", "auto")),
        Cell("smollm2-plan", "SmolLM2-135M, with a plan", _smollm2, (), 25.0, planned=True, needs=given),
        Cell("qwen", "Qwen2.5-Coder-1.5B Q4_K_M, whole", _qwen, (), 480.0, 9.0, needs="--qwen FILE"),
        Cell(
            "qwen-auto", "Qwen2.5-Coder-1.5B Q4_K_M, whole, `--policy auto`", _qwen, ("--policy", "auto"), needs="--qwen FILE"
        ),
        *series,
        *wide,
    ]


CELLS = {cell.name: cell for cell in _cells()}


def predicted(model: Path, cell: Cell, folder: Path) -> dict[str, Any]:
    """What the price says before: by `clada inspect`, as a user would ask it."""
    from clada_export.price import Machine, ModelSize, Work, price

    command = [sys.executable, "-m", "clada_export.cli", "inspect", str(model), "--local-files-only", "--json"]
    done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MissingError(f"clada inspect fails: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    size, machine = ModelSize(**found["size"]), Machine(**found["machine"])
    options = dict(zip(cell.arguments[::2], cell.arguments[1::2], strict=True))
    work = Work(planned=cell.planned, context=int(options.get("--calibration-context", 512)))
    if options.get("--policy") == "auto":
        from clada_export.export_options import ExportOptions
        from clada_export.price import work_of

        work = work_of(ExportOptions(policy="auto"))
    said = price(size, machine, work).to_dict()
    return {"size": asdict(size), "machine": machine.to_dict(), "price": said}


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    """One export, in a folder that is gone afterwards."""
    model = cell.model(settings)
    plan: list[str] = []
    if cell.planned:
        if settings.plan is None or not settings.plan.is_file():
            raise MissingError(f"no plan: needed is {cell.needs}")
        plan = ["--plan", str(settings.plan)]
    with tempfile.TemporaryDirectory(dir=settings.work) as place:
        folder = Path(place)
        said = predicted(model, cell, folder)
        before, left = busy(), available_memory()
        arguments = [str(model), "--target", "ort", "-o", str(folder / "engine"), "--json", *cell.arguments, *plan]
        found = watch(export_command([*arguments, "--calibration-cache", "none"]), env=_environment(), cwd=folder)
        record = _record(cell, found, before)
        record |= {"predicted": said, "available_bytes": left}
        if found.code == 0:
            record["output_bytes"] = sum(file.stat().st_size for file in (folder / "engine").rglob("*") if file.is_file())
            if cell.name == "smollm2" and settings.plan is not None and not settings.plan.exists():
                _keep_plan(folder / "engine", settings.plan)
    return record


def _record(cell: Cell, found: Watched, before: float) -> dict[str, Any]:
    result: dict[str, Any] = {
        "name": cell.name,
        "title": cell.title,
        "arguments": list(cell.arguments),
        "layers": cell.layers,
        "wanted": {"seconds": cell.seconds, "bytes": None if cell.gigabytes is None else cell.gigabytes * 1e9},
        "code": found.code,
        "seconds": found.seconds,
        "peak_bytes": found.peak,
        "own_bytes": found.own,
        "stages": [stage.to_dict() for stage in found.stages],
        "busy_before": round(before, 2),
        "busy_after": round(busy(), 2),
    }
    printed = parsed(found)
    if printed:
        result |= {"sparsity": printed["sparsity"], "drift": printed["drift"], "verified": printed["verified"]}
    else:
        result["reason"] = reason(found)
    return result


def _keep_plan(engine: Path, place: Path) -> None:
    """The plan as a file, if it is one that JSON holds alone."""
    from clada_export.artifact.manifest import read_manifest

    plan = read_manifest(engine, check_files=False).plan
    if plan.get("tensors") is not None:
        return
    place.write_text(json.dumps(plan), encoding="utf-8")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(names: Sequence[str], settings: Settings, result: Path, again: bool, say: Callable[[str], None]) -> bool:
    """Measure cells, one after the other; each is recorded when it is done.

    Returns:
        Whether all of them could be measured, and no export ended in an error.
    """
    import torch

    settings.work.mkdir(parents=True, exist_ok=True)
    threads = int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads())
    good = True
    for name in names:
        recorded = _read(result)
        state = describe(threads)
        known = recorded["cells"].get(name)
        if known is not None and known.get("commit") == state["commit"] and "seconds" in known and not again:
            say(f"{name}: measured before at this commit; --again measures anew")
            continue
        say(f"{name}: {CELLS[name].title}")
        try:
            found = measure(CELLS[name], settings)
        except (MissingError, CladaError) as error:
            say(f"{name}: not measured: {error}")
            good = False
            if known is None:
                recorded["cells"][name] = {"name": name, "title": CELLS[name].title, "missing": _plain(error, settings)}
                _write(result, recorded)
            continue
        recorded["cells"][name] = {**found, **state}
        _write(result, recorded)
        good &= found["code"] == 0
        stages = ", ".join(
            f"{stage['name']} {stage['seconds']:.1f} s {stage['peak'] / 1e9:.2f} GB" for stage in found["stages"]
        )
        say(f"{name}: {found['seconds']:.1f} s, {found['peak_bytes'] / 1e9:.2f} GB: {stages}")
        if found["code"] != 0:
            say(f"{name}: exit code {found['code']}: {found['reason']}")
    return good


def _plain(error: Exception, settings: Settings) -> str:
    """A reason without this machine's folders."""
    return str(error).replace(str(settings.work), "the work folder").replace(str(Path.home()), "~")


def _read(place: Path) -> dict[str, Any]:
    if place.is_file():
        return dict(json.loads(place.read_text(encoding="utf-8")))
    return {"benchmark": "export-cost", "cells": {}}


def _write(place: Path, value: dict[str, Any]) -> None:
    order = {name: index for index, name in enumerate(CELLS)}
    cells = dict(sorted(value["cells"].items(), key=lambda pair: order.get(pair[0], len(order))))
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_suffix(".new")
    new.write_text(json.dumps({**value, "cells": cells}, indent=1) + "\n", encoding="utf-8")
    new.replace(place)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 1 if a cell could not be measured or its export failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", metavar="NAME", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--list", action="store_true", help="name the cells, and measure nothing")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "export-cost", help="for models and engines")
    parser.add_argument("--qwen", type=Path, metavar="FILE", help="Qwen2.5-Coder-1.5B as a GGUF file")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="for SmolLM2 (default: that of the cell smollm2)")
    parser.add_argument("--again", action="store_true", help="measure cells that are there already")
    parser.add_argument("--clean", action="store_true", help="remove the random models afterwards")
    parser.add_argument("--out", type=Path, default=RESULT, metavar="JSON")
    parser.add_argument("--page", action="store_true", help="write the page and its picture, and measure nothing")
    options = parser.parse_args(arguments)
    if options.list:
        for cell in CELLS.values():
            print(f"{cell.name:<14} {cell.title}{f' (needs {cell.needs})' if cell.needs else ''}")
        return 0
    if options.page:
        write_page(_read(options.out))
        return 0
    work = options.work.resolve()
    settings = Settings(work, options.qwen and options.qwen.resolve(), (options.plan or work / "smollm2.plan.json").resolve())
    good = run(options.cells, settings, options.out, options.again, lambda text: print(text, file=sys.stderr, flush=True))
    if options.clean:
        for cell in (NARROW, WIDE):
            for folder in work.glob(f"hidden{cell.hidden}-*"):
                shutil.rmtree(folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
