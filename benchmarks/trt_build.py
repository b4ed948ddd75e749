"""What a TensorRT engine with our op costs to build, against an engine of the same model without it.

For each model and type: one whole `clada-export --target trt` (time, peak memory, checks), then both graphs built again, alone,
in processes of their own: the exported one with the plugin, and the graph as it was traced. No GPU is needed with TensorRT-RTX.

    python -m benchmarks.trt_build --model smollm2=PATH.gguf --model gemma3=PATH.gguf --json benchmarks/results/trt-build.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from benchmarks.child import ChildFailedError, run_child
from clada_export.artifact.manifest import TensorSpec, read_manifest
from clada_export.artifact.profiles import make_profiles
from clada_export.cli import main_export
from clada_export.decoder.torch_decoder import require_torch
from clada_export.native.tensorrt import find_backend
from clada_export.source.load import load_source
from clada_export.targets.common import tensor_spec
from clada_export.targets.options import TensorRTOptions
from clada_export.targets.trt import target as target
from clada_export.targets.trt.build import build_engines
from clada_export.trace.trace import trace

DTYPES = ("float16", "bfloat16")


def export_model(arguments: Sequence[str]) -> int:
    """A child: the command line."""
    return main_export(list(arguments))


def build_exported(arguments: Sequence[str]) -> int:
    """A child: build an export folder's graph with its plugin. Prints seconds, bytes and layers as JSON."""
    folder, out = map(Path, arguments)
    manifest = read_manifest(folder)
    assert manifest.library is not None and manifest.engine is not None
    profiles = [target.Profile.from_dict(value) for value in manifest.engine["profiles"]]
    return _build(folder / manifest.model, manifest.inputs, profiles, folder / manifest.library, out)


def build_traced(arguments: Sequence[str]) -> int:
    """A child: trace the model in a type, build the graph as it is. Prints the same."""
    path, dtype, out = arguments
    source = load_source(path)
    if dtype != "float32":
        target.round_weights(source.decoder, dtype)
    graph = trace(target.traceable(require_torch(source.decoder, "TensorRT"), dtype), fusions=target.FUSIONS).graph
    inputs = tuple(tensor_spec(value) for value in graph.graph.inputs)
    profiles = make_profiles(1, None, None, source.decoder.sequence_limit)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        model = Path(scratch) / "model.onnx"
        ir.save(graph, model, external_data="model.onnx.data")
        del graph, source
        return _build(model, inputs, list(profiles), None, Path(out))


def _build(model: Path, inputs: Sequence[TensorSpec], profiles: Sequence[Any], plugin: Path | None, out: Path) -> int:
    begin = time.perf_counter()
    built = build_engines(
        find_backend(), model, inputs, profiles, TensorRTOptions(), plugin, out, lambda what, done, total: None
    )
    seconds = time.perf_counter() - begin
    plugins = sum(kind == target.PLUGIN_LAYER for _, kind in built.layers)
    print(
        json.dumps(
            {
                "seconds": round(seconds, 2),
                "engine_bytes": sum(file.bytes for file in built.files),
                "layers": len(built.layers),
                "plugin_layers": plugins,
            }
        )
    )
    return 0


def measure(name: str, path: str, dtype: str, work: Path, options: Sequence[str]) -> dict[str, Any]:
    """Export, and build both graphs again."""
    out, record = work / f"{name}-{dtype}", work / "record.json"
    arguments = [path, "--target", "trt", "--dtype", dtype, "-o", str(out), "--overwrite", *options]
    print(f"{name} {dtype}: export", file=sys.stderr, flush=True)
    _, cost = run_child("benchmarks.trt_build:export_model", arguments, record)
    manifest = read_manifest(out)
    assert manifest.engine is not None
    checks = (manifest.verification or {}).get("checks", [])
    found: dict[str, Any] = {
        "model": name,
        "dtype": dtype,
        "ffns": len(manifest.plan["layers"]),
        "plugin_layers": manifest.engine["plugin"]["layers"],
        "compute_capabilities": manifest.engine["files"][0]["compute_capabilities"],
        "expected_sparsity": manifest.sparsity_plan().expected_sparsity,
        "export": cost.to_dict(),
        "onnx_bytes": sum((out / file).stat().st_size for file in ("model.onnx", "model.onnx.data")),
        "checks": {"passed": sum(check["passed"] for check in checks), "all": len(checks)},
        "deferred": [text for text in manifest.warnings if "deferred" in text],
    }
    for key, function, rest in (
        ("with_op", "build_exported", [str(out), str(work)]),
        ("without_op", "build_traced", [path, dtype, str(work)]),
    ):
        print(f"{name} {dtype}: build {key}", file=sys.stderr, flush=True)
        printed, cost = run_child(f"benchmarks.trt_build:{function}", rest, record)
        found[key] = {**json.loads(printed.splitlines()[-1]), "process": cost.to_dict()}
        (work / "model.engine").unlink()
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | type | plugin layers / FFNs | engine with op | without | build with op | without | whole export | checks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for item in results:
        with_op, without = item["with_op"], item["without_op"]
        lines.append(
            f"| {item['model']} | {item['dtype']} | {item['plugin_layers']} / {item['ffns']} | "
            f"{with_op['engine_bytes'] / 1e6:.0f} MB | {without['engine_bytes'] / 1e6:.0f} MB | {with_op['seconds']:.1f} s | "
            f"{without['seconds']:.1f} s | {item['export']['seconds']:.0f} s, {item['export']['peak_bytes'] / 1e9:.1f} GB | "
            f"{item['checks']['passed']}/{item['checks']['all']} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/trt"), help="keeps the exports")
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs="*", help="further options of clada-export, after --")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "tensorrt_rtx": importlib.metadata.version("tensorrt-rtx-cu13"),
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "results": [],
    }
    if options.json and options.json.is_file():  # goes on where it stood
        found["results"] = json.loads(options.json.read_text(encoding="utf-8"))["results"]
    results = found["results"]
    failures = 0
    for given in options.model:
        name, _, path = given.partition("=")
        for dtype in options.dtypes:
            if any((item["model"], item["dtype"]) == (name, dtype) for item in results):
                continue
            try:
                results.append(measure(name, path, dtype, options.work, options.options))
            except ChildFailedError as error:
                print(f"{name} {dtype}: {error}", file=sys.stderr)
                failures += 1
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
