"""Time one decode row through many FFN layers: the SparseFFN kernel against ONNX Runtime's own MatMul FFN.

Enough layers that their weights do not fit the caches, as in a real model. Every variant runs in turn, round after round, so
that a slow moment of the machine hits all of them.

    python benchmarks/ffn_kernel.py --hidden 576 --intermediate 1536 --layers 30 --json results.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from clada_export.native.library import build_info, ort_library_path
from clada_export.op.reference import quantize_shadow
from graph_passes.op import DOMAIN, OP_TYPE, SparseFFNAttributes, input_names, output_names

_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ONNX = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int8: TensorProto.INT8,
}


def _initializer(name: str, value: torch.Tensor) -> onnx.TensorProto:
    """A tensor whose data come from memory: every session shares one copy of the weights."""
    proto = TensorProto(name=name, data_type=_ONNX[value.dtype], dims=list(value.shape))
    proto.data_location = TensorProto.EXTERNAL
    proto.external_data.add(key="location", value="memory")
    return proto


def _ort_value(value: torch.Tensor) -> ort.OrtValue:
    if value.dtype == torch.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value.view(torch.uint16).numpy(), TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(value.numpy())


class Layers:
    """Random weights of `count` layers in the op's layout."""

    def __init__(self, count: int, d: int, f: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        self.count, self.d, self.f, self.dtype = count, d, f, dtype
        self.tensors: dict[str, torch.Tensor] = {}
        self.x = torch.randn(1, 1, d, generator=generator)
        for i in range(count):
            w_in = torch.randn(f, 2, d, generator=generator) / d**0.5
            w_out = torch.randn(f, d, generator=generator) / f**0.5
            shadow, scale = quantize_shadow(w_in)
            self.tensors |= {f"{i}.w_in": w_in.to(dtype), f"{i}.w_out": w_out.to(dtype)}
            self.tensors |= {f"{i}.neuron_scale": w_out.norm(dim=1), f"{i}.shadow": shadow, f"{i}.shadow_scale": scale}
        self.values = {name: _ort_value(value) for name, value in self.tensors.items()}

    def scores(self, layer: int, score: str, x: torch.Tensor) -> torch.Tensor:
        pre = torch.einsum("fnd,td->tfn", self.tensors[f"{layer}.w_in"].float(), x.reshape(-1, self.d))
        gate = torch.nn.functional.silu(pre[..., 0])
        return gate.abs() if score == "gate" else (gate * pre[..., 1]).abs() * self.tensors[f"{layer}.neuron_scale"]


def _session(
    nodes: list[onnx.NodeProto], protos: list[onnx.TensorProto], values: dict[str, Any], threads: int
) -> ort.InferenceSession:
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, None]),
        helper.make_tensor_value_info("load", TensorProto.FLOAT, [None, None]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "ffn", inputs, outputs, protos)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(ort_library_path()))
    options.add_external_initializers(list(values), list(values.values()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def sparse_session(layers: Layers, score: str, sparsity: float, threads: int) -> ort.InferenceSession:
    """A chain-free stack: every layer reads x, the results are added."""
    attributes = SparseFFNAttributes(score=score)
    nodes, protos, values = [], [], {}
    for i in range(layers.count):
        names = [name if name in ("x", "load") else f"{i}.{name}" for name in input_names(attributes)]
        scores = layers.scores(i, score, layers.x)
        protos.append(helper.make_tensor(f"{i}.threshold", TensorProto.FLOAT, [1], [float(scores.quantile(sparsity))]))
        for name in names:
            if name in layers.tensors:
                protos.append(_initializer(name, layers.tensors[name]))
                values[name] = layers.values[name]
        nodes.append(
            helper.make_node(
                OP_TYPE, names, [f"{i}.{o}" for o in output_names(attributes)], f"{i}", domain=DOMAIN, **attributes.to_onnx()
            )
        )
    nodes.append(helper.make_node("Sum", [f"{i}.y" for i in range(layers.count)], ["y"]))
    return _session(nodes, protos, values, threads)


def matmul_session(layers: Layers, threads: int) -> ort.InferenceSession:
    """The same FFNs as ordinary nodes, float32: MatMul on prepacked weights."""
    nodes, protos, values = [], [], {}
    for i in range(layers.count):
        w_in, w_out = layers.tensors[f"{i}.w_in"].float(), layers.tensors[f"{i}.w_out"].float()
        for name, value in (("gate", w_in[:, 0].T), ("up", w_in[:, 1].T), ("down", w_out)):
            tensor = value.contiguous()
            protos.append(_initializer(f"{i}.{name}", tensor))
            values[f"{i}.{name}"] = _ort_value(tensor)
        nodes += [
            helper.make_node("MatMul", ["x", f"{i}.gate"], [f"{i}.g"]),
            helper.make_node("Sigmoid", [f"{i}.g"], [f"{i}.s"]),
            helper.make_node("Mul", [f"{i}.g", f"{i}.s"], [f"{i}.a"]),
            helper.make_node("MatMul", ["x", f"{i}.up"], [f"{i}.u"]),
            helper.make_node("Mul", [f"{i}.a", f"{i}.u"], [f"{i}.h"]),
            helper.make_node("MatMul", [f"{i}.h", f"{i}.down"], [f"{i}.y"]),
        ]
    nodes.append(helper.make_node("Sum", [f"{i}.y" for i in range(layers.count)] + ["zero"], ["z"]))
    # `load` must be an input of both models; adding zero keeps it connected.
    nodes.insert(0, helper.make_node("Clip", ["load", "low", "low"], ["clipped"]))
    nodes.insert(1, helper.make_node("Unsqueeze", ["clipped", "axis"], ["zero"]))
    nodes.append(helper.make_node("Identity", ["z"], ["y"]))
    protos.append(helper.make_tensor("low", TensorProto.FLOAT, [], [0.0]))
    protos.append(helper.make_tensor("axis", TensorProto.INT64, [1], [2]))
    return _session(nodes, protos, values, threads)


def measure(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, the variants in turn."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(rounds):
        for name, run in variants.items():
            run()  # the caches now hold what this variant leaves there, as in a steady state
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=1, help="rows of a call; more than one are all dense")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtype", choices=sorted(_TYPES), default="float32", help="type of SparseFFN's weights")
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.3, 0.5, 0.7])
    parser.add_argument("--scores", nargs="*", default=["shadow", "gate"])
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(arguments)

    layers = Layers(args.layers, args.hidden, args.intermediate, _TYPES[args.dtype])
    x = layers.x.expand(1, args.rows, -1).contiguous().numpy()

    def runner(session: ort.InferenceSession, load: float) -> Callable[[], object]:
        feed = {"x": x, "load": np.full((1, args.rows), load, np.float32)}
        return lambda: session.run(None, feed)

    variants = {"matmul float32": runner(matmul_session(layers, args.threads), 0.0)}
    variants["dense"] = runner(sparse_session(layers, "gate", 0.0, args.threads), float("inf"))
    if args.rows == 1:
        for score in args.scores:
            # A threshold above every score leaves the cost of scoring.
            for sparsity in [*args.sparsity, 1.0]:
                variants[f"{score} {sparsity:.2f}"] = runner(sparse_session(layers, score, sparsity, args.threads), 0.0)
    times = measure(variants, args.rounds)

    bytes_dense = 3 * args.hidden * args.intermediate * (4 if args.dtype == "float32" else 2)
    rows: dict[str, Any] = {}
    print(f"{'variant':<16} {'median ms':>10} {'min ms':>8} {'x matmul':>9}   a layer, {args.rows} row(s)")
    for name, seconds in times.items():
        per_layer = [1e3 * value / args.layers for value in seconds]
        rows[name] = {"median_ms": statistics.median(per_layer), "min_ms": min(per_layer), "all_ms": per_layer}
        ratio = rows[name]["median_ms"] / rows["matmul float32"]["median_ms"]
        print(f"{name:<16} {rows[name]['median_ms']:>10.4f} {rows[name]['min_ms']:>8.4f} {ratio:>9.3f}")
    print(f"dense reads {bytes_dense / rows['dense']['min_ms'] / 1e6:.1f} GB/s at best")
    if args.json:
        about = {
            "machine": platform.processor() or platform.machine(),
            "onnxruntime": ort.__version__,
            "library": build_info(ort_library_path()),
            "isa": os.environ.get("CLADA_ISA", ""),
        }
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        text = json.dumps({"about": about, "settings": settings, "results": rows}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
