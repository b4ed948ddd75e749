"""How long the graph passes take, and how much memory, by the number of layers.

    python -m benchmarks.passes --out benchmarks/results/passes.json [--model model.onnx]
    python -m benchmarks.passes --page      # the table of docs/matching.md from the recorded results

Small Llama graphs of 30, 60 and 120 layers are traced once and kept; a model file of your own may come beside them. Each is
read, searched and rewritten in a process of its own, whose peak memory is that of the passes. `slope` is the exponent of
seconds in the number of nodes between the smallest and the largest graph: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks import environment
from benchmarks.child import run_child
from benchmarks.decode import say
from benchmarks.markers import fill
from benchmarks.table import markdown
from clada_export.decoder.torch_decoder import TorchDecoder
from graph_passes import FFNRewrite, find_ffns, rewrite_ffns
from graph_passes.op import SparseFFNAttributes

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "passes.json", ROOT / "docs" / "matching.md"
LAYERS = (30, 60, 120)
REPEATS = 3


def make(arguments: Sequence[str]) -> int:
    """Write the graph of a small Llama: FOLDER LAYERS. For `benchmarks.child`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from clada_export.trace.trace import trace

    folder, layers = Path(arguments[0]), int(arguments[1])
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=4, vocab_size=256
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(trace(TorchDecoder(model)).graph, folder / "model.onnx", external_data="model.onnx.data")
    return 0


def measure(arguments: Sequence[str]) -> int:
    """Search and rewrite FILE, and print what it took as JSON. For `benchmarks.child`."""
    path = Path(arguments[0])
    search, rewrite, nodes, layers, weights = [], [], 0, 0, 0
    for _ in range(REPEATS):
        model = ir.load(path)
        nodes = model.graph.num_nodes()
        start = time.perf_counter()
        found = find_ffns(model)
        search.append(time.perf_counter() - start)
        layers = len(found.matches)
        plain = FFNRewrite(SparseFFNAttributes(score="exact"), np.zeros(1, np.float32), _constants)
        start = time.perf_counter()
        report = rewrite_ffns(model, {match.name: plain for match in found.matches})
        rewrite.append(time.perf_counter() - start)
        weights = sum(item.weight_bytes for item in report.ffns)
        del model, found, report
    result = {"nodes": nodes, "layers": layers, "weight_bytes": weights, "search_s": min(search), "rewrite_s": min(rewrite)}
    print(json.dumps(result))
    return 0


def _constants(w_in: np.ndarray, w_out: np.ndarray) -> dict[str, np.ndarray]:
    return {"neuron_scale": np.linalg.norm(w_out, axis=1).astype(np.float32)}


def section(result: dict[str, Any]) -> str:
    """The table, and what it was measured with."""
    head = ("graph", "nodes", "layers", "search, ms", "rewrite, ms", "FFN weights, MB", "peak of the process, MB")
    rows = [
        (
            row["name"],
            str(row["nodes"]),
            str(row["layers"]),
            f"{row['search_s'] * 1e3:.0f}",
            f"{row['rewrite_s'] * 1e3:.0f}",
            f"{row['weight_bytes'] / 1e6:.0f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
        for row in result["rows"]
    ]
    made = f"{result['machine']['cpu']}, one thread, commit {str(result['commit'])[:10]}"
    return f"{markdown(head, rows)}\n\nSeconds grow as nodes to the power of {result['slope']:.2f}. {made}."


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file of results")
    parser.add_argument("--page", action="store_true", help="measure nothing, and write the table of the results")
    parser.add_argument("--model", type=Path, action="append", default=[], help="an .onnx file to measure too")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/passes"))
    options = parser.parse_args(arguments)
    if options.page:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), section(json.loads(options.out.read_text()))), encoding="utf-8")
        return 0
    files = []
    for layers in LAYERS:
        folder = options.work / str(layers)
        if not (folder / "model.onnx").is_file():
            say(f"tracing {layers} layers")
            options.work.mkdir(parents=True, exist_ok=True)
            run_child("benchmarks.passes:make", [str(folder), str(layers)], options.work / "cost.json")
        files.append((f"{layers} layers", folder / "model.onnx"))
    rows: list[dict[str, Any]] = []
    for name, path in [*files, *((path.parent.name, path) for path in options.model)]:
        text, cost = run_child("benchmarks.passes:measure", [str(path)], options.work / "cost.json")
        rows.append({"name": name, **json.loads(text), "peak_bytes": cost.peak_bytes})
        say(f"{name}: {rows[-1]}")
    small, large = rows[0], rows[len(LAYERS) - 1]
    seconds = [row["search_s"] + row["rewrite_s"] for row in (small, large)]
    slope = math.log(seconds[1] / seconds[0]) / math.log(large["nodes"] / small["nodes"])
    result = {"benchmark": "passes", "format": 1, **environment.describe(1), "slope": slope, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
