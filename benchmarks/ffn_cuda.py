"""Time one FFN on a GPU: the SparseFFN kernels against a dense FFN of cuBLAS (through PyTorch), in the same run.

Every variant is a CUDA graph that goes through several copies of the weights, so that the second-level cache can't hold them,
and the variants take turns, round after round. Numbers are medians of microseconds a call. Each variant's result is compared
with the reference in float32 first; its error is in the results.

    python benchmarks/ffn_cuda.py --library build/gpu/libclada_cuda_kernels.so --json results.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cuda_kernels import Call, CudaKernels
from clada_export.op.reference import SparseFFNTensors, quantize_shadow, sparse_ffn
from graph_passes.op import SparseFFNAttributes

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SIZES = {"llama-7b": (4096, 11008), "llama-8b": (4096, 14336), "1b": (2048, 8192), "smollm2-135m": (576, 1536)}
DECODE_ROWS = (1, 2, 4, 8, 16)
PROMPT_ROWS = (32, 256, 2048)
FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.1)
SCORES = ("external", "shadow", "gate", "exact")


@dataclass
class Weights:
    """One layer's weights, in the op's layout, and gate over up [2 f, d] as dense layers have them."""

    w_in: Tensor
    w_out: Tensor
    neuron_scale: Tensor
    shadow: Tensor
    shadow_scale: Tensor
    gate_up: Tensor

    @classmethod
    def random(cls, d: int, f: int, dtype: torch.dtype, device: torch.device, seed: int) -> Weights:
        generator = torch.Generator(device).manual_seed(seed)
        w_in = (torch.randn(f, 2, d, generator=generator, device=device) / d**0.5).to(dtype)
        w_out = (torch.randn(f, d, generator=generator, device=device) / f**0.5).to(dtype)
        shadow, shadow_scale = quantize_shadow(w_in)
        return cls(
            w_in, w_out, w_out.float().norm(dim=1), shadow, shadow_scale, w_in.transpose(0, 1).flatten(0, 1).contiguous()
        )

    def tensors(self, threshold: Tensor) -> SparseFFNTensors:
        return SparseFFNTensors(self.w_in, self.w_out, threshold, self.neuron_scale, self.shadow, self.shadow_scale)


def dense(weights: Weights, x: Tensor) -> Tensor:
    """The dense FFN as inference engines run it: gate and up in one product, then down; each by cuBLAS."""
    gate, up = torch.nn.functional.linear(x, weights.gate_up).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ weights.w_out


def dense_split(weights: Weights, x: Tensor) -> Tensor:
    """The dense FFN as transformers runs it: three products."""
    gate, up = weights.gate_up.chunk(2)
    hidden = torch.nn.functional.silu(torch.nn.functional.linear(x, gate)) * torch.nn.functional.linear(x, up)
    return hidden @ weights.w_out


def make_call(
    kernels: CudaKernels, weights: Weights, x: Tensor, score: str, fraction: float, seed: int
) -> tuple[Call, SparseFFNAttributes, SparseFFNTensors, dict[str, Tensor]]:
    """A call in which about `fraction` of the neurons run in every row. 1 is the dense mode: load = +inf."""
    f, rows, device = weights.w_in.shape[0], x.shape[0] * x.shape[1], x.device
    attributes = SparseFFNAttributes(score=score, rule="threshold", emit_active=True)
    extra: dict[str, Tensor] = {}
    if score == "external":
        generator = torch.Generator(device).manual_seed(seed)
        extra["score"] = torch.rand(*x.shape[:2], f, generator=generator, device=device)
        level = 1.0 - fraction
    else:
        level = quantile(weights, x, score, fraction)
    threshold = torch.tensor([max(level, 0.0)], device=device)
    load = torch.full(x.shape[:2], float("inf") if fraction == 1.0 else 0.0, device=device)
    tensors = weights.tensors(threshold)
    inputs = {"x": x, "load": load, "w_in": weights.w_in, "w_out": weights.w_out, "threshold": threshold, **extra}
    if score in ("shadow", "exact"):
        inputs["neuron_scale"] = weights.neuron_scale
    if score == "shadow":
        inputs |= {"shadow": weights.shadow, "shadow_scale": weights.shadow_scale}
    assert rows == load.numel()
    return kernels.call(attributes, inputs), attributes, tensors, {"load": load, **extra}


def quantile(weights: Weights, x: Tensor, score: str, fraction: float) -> float:
    """The threshold that keeps `fraction` of the neurons of these rows."""
    pre = torch.einsum("fnd,bsd->bsfn", weights.w_in.float(), x.float())
    gate = torch.nn.functional.silu(pre[..., 0])
    values = gate.abs() if score == "gate" else (gate * pre[..., 1]).abs() * weights.neuron_scale
    keep = max(1, round(fraction * values.numel()))
    ranked = values.flatten().sort(descending=True).values
    # Between two scores, so that rounding moves no neuron across.
    return float(ranked[keep - 1 : keep + 1].mean())


class Timer:
    """Times graphs in turn."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.variants: dict[str, tuple[Callable[[], None], int]] = {}

    def add(self, name: str, calls: list[Callable[[], None]]) -> None:
        """`calls` are enqueued one after the other; the time of the whole is divided by their number."""
        if not torch.cuda.is_available():
            self.variants[name] = (lambda: [call() for call in calls], len(calls))  # type: ignore[func-returns-value,assignment]
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:  # handles, modules and algorithms are made outside of the graph
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        self.variants[name] = (graph.replay, len(calls))

    def run(self) -> dict[str, dict[str, float]]:
        """Median, lowest and highest microseconds a call of each variant."""
        times: dict[str, list[float]] = {name: [] for name in self.variants}
        for round_ in range(self.rounds + 3):
            for name, (replay, count) in self.variants.items():
                elapsed = _elapsed(replay) / count
                if round_ >= 3:
                    times[name].append(elapsed)
        return {
            name: {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
            for name, values in times.items()
        }


def _elapsed(work: Callable[[], None]) -> float:
    """Microseconds."""
    if not torch.cuda.is_available():
        import time

        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e6
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream) if torch.cuda.is_available() else 0


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """norm(found - wanted) / norm(wanted); infinite where a number is missing."""
    error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    return error if error == error else float("inf")


def measure(
    kernels: CudaKernels, d: int, f: int, dtype: torch.dtype, rows: int, scores: tuple[str, ...], fractions: tuple[float, ...],
    *, rounds: int, cache_bytes: int, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Dense and sparse times of one shape.

    Returns:
        by variant: times, the neurons that ran, the bytes that had to be read, the error against the reference.
    """
    weight_bytes = 3 * d * f * dtype.itemsize
    copies = max(2, min(64, -(-4 * cache_bytes // weight_bytes)))
    layers = [Weights.random(d, f, dtype, device, seed) for seed in range(copies)]
    generator = torch.Generator(device).manual_seed(7)
    # Rows of a batch: one token each, so that every row has a choice of its own; long prompts are one sequence.
    shape = (rows, 1, d) if rows <= 16 else (1, rows, d)
    x = torch.randn(shape, generator=generator, device=device).to(dtype)
    timer, known = Timer(rounds), dict[str, dict[str, Any]]()
    timer.add("dense", [lambda w=w: dense(w, x) for w in layers])  # type: ignore[misc]
    timer.add("dense_split", [lambda w=w: dense_split(w, x) for w in layers])  # type: ignore[misc]
    known["dense"] = known["dense_split"] = {"bytes": weight_bytes, "active": 1.0}
    keep: list[Any] = []
    for score in scores:
        for fraction in fractions:
            if fraction == 1.0 and score != scores[0]:
                continue  # load = +inf scores nothing
            made = [make_call(kernels, w, x, score, fraction, seed) for seed, w in enumerate(layers)]
            calls = [item[0] for item in made]
            workspace = kernels.workspace(calls, device)
            keep += [calls, workspace]
            _, attributes, tensors, inputs = made[0]
            kernels.run(calls[0], workspace, _stream())
            wanted = sparse_ffn(x, inputs["load"], tensors, attributes, score=inputs.get("score"))
            active = calls[0].active.float().mean().item() / f
            union = 1.0 if fraction == 1.0 else float(wanted.mask.flatten(0, -2).any(0).float().mean())
            name = f"{score} {fraction:.0%}" if fraction < 1.0 else "load=inf"
            known[name] = {
                "active": active,
                "active_in_any_row": union,
                "bytes": round(_bytes(d, f, dtype, score if fraction < 1.0 else "none", union)),
                "error": relative_error(calls[0].y, wanted.y),
                "active_differs": int((calls[0].active != wanted.active).sum()),
            }
            timer.add(name, [lambda c=c, w=workspace: kernels.run(c, w, _stream()) for c in calls])  # type: ignore[misc]
    times = timer.run()
    best = min(times["dense"]["median"], times["dense_split"]["median"])
    return {
        name: {
            "microseconds": {key: round(value, 3) for key, value in times[name].items()},
            "of_dense": round(times[name]["median"] / best, 4),
            "gigabytes_per_second": round(known[name]["bytes"] / times[name]["median"] / 1e3, 1),
            **known[name],
        }
        for name in times
    }


def _bytes(d: int, f: int, dtype: torch.dtype, score: str, active: float) -> float:
    """Weight bytes that a decode step must read."""
    row = d * dtype.itemsize
    once = {"none": 0.0, "external": 4.0, "gate": float(row), "exact": 2.0 * row, "shadow": 2 * d * 20 / 32}[score]
    left = {"none": 3, "external": 3, "gate": 2, "exact": 1, "shadow": 3}[score]
    return f * (once + active * left * row)


def bandwidth(device: torch.device) -> float:
    """Measured GB/s of a large device-to-device copy, bytes read plus bytes written."""
    if not torch.cuda.is_available():
        return 0.0
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timer = Timer(10)
    timer.add("copy", [lambda: target.copy_(source)])  # type: ignore[func-returns-value,list-item]
    return 2 * source.numel() / timer.run()["copy"]["median"] / 1e3


def break_even(results: list[dict[str, Any]]) -> dict[str, int | None]:
    """By size, type and fraction (score `external`): the largest batch at which sparse is faster than dense."""
    found: dict[str, int | None] = {}
    for item in results:
        if item["rows"] > 16:
            continue
        for name, variant in item["variants"].items():
            if name.startswith("external"):
                key = f"{item['size']} {item['dtype']} {name.removeprefix('external ')}"
                found.setdefault(key, None)
                if variant["of_dense"] < 1.0:
                    found[key] = max(found[key] or 0, item["rows"])
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="libclada_cuda_kernels.so")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="names, or D,F")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16", "float32"], choices=list(TYPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[*DECODE_ROWS, *PROMPT_ROWS])
    parser.add_argument("--fractions", nargs="+", type=float, default=list(FRACTIONS), help="active neurons of decode steps")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(arguments)
    kernels = CudaKernels(options.library)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    cache = 1 << 20
    about: dict[str, Any] = {"device": "emulated on the CPU", "torch": torch.__version__, "gemm": kernels.gemm}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        cache = int(properties.L2_cache_size)
        about |= {"device": properties.name, "multiprocessors": properties.multi_processor_count, "cache_bytes": cache}
    about["copy_gigabytes_per_second"] = round(bandwidth(device), 1)
    results = []
    for size in options.sizes:
        d, f = SIZES[size] if size in SIZES else tuple(int(part) for part in size.split(","))
        for dtype in options.dtypes:
            for rows in options.rows:
                # The other scores cost the same beyond one row; prompts are dense arithmetic whatever the score.
                scores = SCORES if rows == 1 else SCORES[:1]
                fractions = tuple(options.fractions) if rows <= 16 else (1.0,)
                variants = measure(
                    kernels,
                    d,
                    f,
                    TYPES[dtype],
                    rows,
                    scores,
                    fractions,
                    rounds=options.rounds,
                    cache_bytes=cache,
                    device=device,
                )
                results.append({"size": size, "d": d, "f": f, "dtype": dtype, "rows": rows, "variants": variants})
                for name, variant in variants.items():
                    print(
                        f"{size:14} {dtype:9} rows {rows:5} {name:14} {variant['microseconds']['median']:10.2f} us  "
                        f"{variant['of_dense']:6.3f} of dense  {variant['gigabytes_per_second']:8.1f} GB/s  "
                        f"active {variant['active']:.3f}  error {variant.get('error', 0.0):.1e}",
                        flush=True,
                    )
    found = {"about": about, "results": results, "break_even_batch": break_even(results)}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
