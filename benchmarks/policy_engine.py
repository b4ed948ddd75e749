"""Engines of many plans over one trace, and what one of them does on the clock.

    python -m benchmarks.policy_engine ENGINE TASK.json     # in a process of its own; prints JSON

The model is traced once. Every plan is rewritten into a copy of the traced graph that shares its weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from benchmarks.child import run_child
from benchmarks.engine_folder import write_engine_manifest
from clada_export.decoder.torch_decoder import require_torch
from clada_export.errors import UsageError
from clada_export.native.library import LIBRARY_NAME, ort_library_path
from clada_export.plan.plan import SparsityPlan
from clada_export.runtime import load_engine
from clada_export.runtime.engine import Load
from clada_export.source.load import SourceModel
from clada_export.targets.common import BuildRequest, ffn_rewrite, run_passes, save
from clada_export.targets.ort import target as target_ort
from clada_export.trace.trace import TracedModel, trace
from graph_passes.dead_columns import DropDeadColumns
from graph_passes.machine_paths import ForgetMachinePaths
from graph_passes.pass_list import PassList
from graph_passes.report import RewriteReport
from graph_passes.reshapes import RemoveHeadReshapes


class Workshop:
    """Builds engines for ONNX Runtime, float32, out of one trace.

    Args:
        source: the dense model.
    """

    def __init__(self, source: SourceModel) -> None:
        self._source, self._ffns = source, {ffn.name: ffn for ffn in source.decoder.ffns}
        self._traced: TracedModel | None = None

    @property
    def traced(self) -> bool:
        """Whether the trace is there."""
        return self._traced is not None

    def trace(self) -> None:
        """Trace the model, which takes minutes; the first `build` does it otherwise."""
        if self._traced is None:
            self._traced = trace(require_torch(self._source.decoder, "tracing"), fusions=target_ort.FUSIONS)

    def build(self, plan: SparsityPlan, folder: Path) -> None:
        """Write an engine; the model's FFN weights are taken as they are now where the plan says that they have changed.

        Raises:
            UsageError: changed weights of a model whose score is made from its weights (`shadow`, `exact`).
        """
        self.trace()
        assert self._traced is not None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        graph = self._traced.graph.clone()
        request = BuildRequest(TracedModel(graph, self._traced.fusions), plan, folder)
        rewrite = ffn_rewrite(request)
        passes = PassList(rewrite, DropDeadColumns(), RemoveHeadReshapes(), ForgetMachinePaths())
        report = run_passes(request, rewrite, passes)
        if plan.prune is not None or any(layer.adapter_rank is not None for layer in plan.layers):
            self._take_weights(graph, plan, report)
        save(graph, folder)
        shutil.copyfile(ort_library_path(), folder / LIBRARY_NAME)
        plan.save_arrays(folder)
        write_engine_manifest(folder, self._source, graph, plan, library=LIBRARY_NAME)

    def _take_weights(self, graph: ir.Model, plan: SparsityPlan, report: RewriteReport) -> None:
        """Put the eager model's weights into the op nodes: the trace may hold copies from before they were changed."""
        if plan.score in ("shadow", "exact"):
            raise UsageError(
                f"policy {plan.policy}: score {plan.score!r} of changed weights is not built here; use clada-export"
            )
        for item in report.ffns:
            ffn, layer = self._ffns[item.name], plan.layer(item.name)
            assert layer is not None
            neurons = plan.tensors(layer).neurons
            order = torch.arange(ffn.intermediate_size) if neurons is None else torch.from_numpy(neurons)
            gate_bias, up_bias, down_bias = ffn.biases()
            arrays = {
                "w_in": ffn.w_in()[order],
                "w_out": ffn.w_out()[order],
                "gate_bias": None if gate_bias is None else gate_bias[order],
                "up_bias": None if up_bias is None else up_bias[order],
                "down_bias": down_bias,
            }
            for name, tensor in arrays.items():
                value = graph.graph.initializers.get(f"{item.node}.{name}")
                if value is not None and tensor is not None:
                    value.const_value = ir.Tensor(np.ascontiguousarray(tensor.numpy()), name=value.name)


@dataclass(frozen=True)
class Task:
    """What an engine does on the clock.

    Attributes:
        prompts: token ids; each is a round.
        load: of the sparse side; the other side is `dense`.
    """

    prompts: list[list[int]]
    new_tokens: int
    load: Load
    threads: int


def clock(folder: Path, task: Task, work: Path) -> dict[str, Any]:
    """`race` in a process of its own, so that no other session or thread pool is in the way.

    Raises:
        ChildFailedError: it has failed; it has said why on stderr.
    """
    place = work / "task.json"
    place.write_text(json.dumps(vars(task)))
    text, cost = run_child("benchmarks.policy_engine:main", [str(folder), str(place)], work / "cost.json")
    found: dict[str, Any] = json.loads(text)
    return {**found, "peak_bytes": cost.peak_bytes}


def race(folder: Path, task: Task) -> dict[str, Any]:
    """Decode every prompt greedily, dense and sparse in turns, on one graph.

    Returns:
        `dense` and `sparse`, each with the median time between tokens over all rounds and of each round (ms), `tokens` of each
        prompt, and for sparse the skipped share of each layer; `speedup`: dense over sparse, round by round.
    """
    engine = load_engine(folder, threads=task.threads)
    sides: dict[str, Load] = {"dense": "dense", "sparse": task.load}
    steps: dict[str, list[list[float]]] = {name: [] for name in sides}
    tokens: dict[str, list[list[int]]] = {name: [] for name in sides}
    ran: list[np.ndarray] = []
    for load in sides.values():
        engine.generate([task.prompts[0]], min(task.new_tokens, 8), load=load, eos_token_id=[], do_sample=False)
    for number, prompt in enumerate(task.prompts):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in order:
            made = engine.generate([prompt], task.new_tokens, load=sides[name], eos_token_id=[], do_sample=False)
            steps[name].append(made.decode_s)
            tokens[name].append(made.tokens[0])
            if name == "sparse" and made.active is not None:
                ran.append(made.active[:, 0].mean(axis=0))
    widths = np.array([layer.get("kept_neurons") or layer["intermediate_size"] for layer in engine.manifest.plan["layers"]])
    skipped = 1.0 - np.mean(ran, axis=0) / widths
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(steps["dense"], steps["sparse"], strict=True)]
    sums = {
        name: {
            "itl_p50_ms": statistics.median(step for one in rounds for step in one) * 1e3,
            "rounds_ms": [statistics.median(one) * 1e3 for one in rounds],
            "tokens": tokens[name],
        }
        for name, rounds in steps.items()
    }
    return {
        "dense": sums["dense"],
        "sparse": {
            **sums["sparse"],
            "layer_sparsity": skipped.tolist(),
            "sparsity": float(np.average(skipped, weights=widths)),
        },
        "speedup": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "load": task.load,
    }


def common_prefix(found: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    same = [a == b for a, b in zip(found, wanted, strict=False)]
    return same.index(False) if False in same else len(same)


def main(arguments: Sequence[str] | None = None) -> int:
    """The process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("task", type=Path)
    options = parser.parse_args(arguments)
    print(json.dumps(race(options.engine, Task(**json.loads(options.task.read_text())))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
