"""Time SparseFFN with quantised weights on the shapes of whole decoders, at several shares of skipped neurons.

All layers run in sequence, so weights come from where they would in a model. Shares run in turn, round after round, so that a
slow moment of the machine hits all of them. What a plain read of as many bytes takes, `benchmarks.quant_kernel` says.

    python -m benchmarks.ffn_quant_kernel --models smollm2 qwen --threads 1 2 --json results.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from benchmarks.environment import busy, describe
from clada_export.native.library import build_info, ort_library_path
from graph_passes.op import DOMAIN, FORMAT_BITS, OP_TYPE, SparseFFNAttributes, input_names, weight_shapes

MODELS = {"smollm2": (30, 576, 1536), "qwen": (28, 1536, 8960)}
"""Layers, hidden size and neurons of SmolLM2-135M and Qwen2.5-Coder-1.5B."""
SKIPPED = (0.0, 0.3, 0.5, 0.63)
_SCALE = 1 / 128


@dataclass
class Stack:
    """A session of all layers; thresholds are inputs, so that one copy of the weights serves all shares."""

    session: ort.InferenceSession
    feeds: dict[str, np.ndarray]
    weight_format: str
    sizes: tuple[int, int, int]

    def run(self, threshold: float) -> float:
        """Run once; the share of neurons that was skipped."""
        layers, _, f = self.sizes
        self.feeds["threshold"] = np.array([threshold], np.float32)
        counts = self.session.run(None, self.feeds)
        return 1.0 - float(sum(int(each.sum()) for each in counts)) / (layers * f)

    def threshold(self, skipped: float) -> float:
        """The threshold that skips about so many."""
        low, high = 0.0, 1e6
        if skipped == 0.0:
            return 0.0
        for _ in range(40):
            middle = (low * high) ** 0.5 if low > 0 else high / 1e3
            low, high = (middle, high) if self.run(middle) < skipped else (low, middle)
            if low == 0.0 and high < 1e-6:
                break
        return high

    def bytes(self, skipped: float) -> float:
        """Of weights that a call reads: gate and up, of the down matrix what is not skipped, and its scales."""
        layers, d, f = self.sizes
        bits = FORMAT_BITS[self.weight_format]
        return layers * (2 * f * d * (bits / 8 + 1 / 16) + f * d * (bits / 8 * (1 - skipped) + 1 / 16))


def _random(shape: tuple[int, ...]) -> np.ndarray:
    """Random codes, with scales of 1 / 128 at the end of each record."""
    size = int(np.prod(shape))
    memory = np.empty(size + 64, np.uint8)
    at = -memory.ctypes.data % 64
    array = memory[at : at + size]
    array[:] = np.resize(np.random.default_rng(size).integers(0, 256, 1 << 16, dtype=np.uint8), size)
    return array.reshape(shape)


def stack(model: str, weight_format: str, threads: int) -> Stack:
    """A gated FFN with SiLU a layer, each of which reads the same x."""
    layers, d, f = MODELS[model]
    attributes = SparseFFNAttributes(weight_format=weight_format, score="exact", emit_active=True)
    settings: dict[str, Any] = dict(attributes.to_onnx())
    shapes = weight_shapes(attributes, d, f)
    half = np.frombuffer(np.float16(_SCALE).tobytes(), np.uint8)
    nodes, protos, values, outputs = [], [], {}, []
    for i in range(layers):
        w_in, w_out = _random(shapes["w_in"]), _random(shapes["w_out"])
        w_in[..., -64:], w_out[:, -2 * d :] = np.resize(half, 64), np.resize(half, 2 * d)
        # Neurons of many sizes: scales of gate rows fall off.
        factor = np.exp(-3 * np.random.default_rng(i).random((len(w_in), 1, 16))).astype(np.float16) * np.float16(_SCALE)
        w_in[..., -64:-32] = np.broadcast_to(factor, (len(w_in), d // 32, 16)).copy().view(np.uint8)
        constants = {"w_in": w_in, "w_out": w_out, "neuron_scale": np.ones(f, np.float32)}
        for name, array in constants.items():
            proto = TensorProto(name=f"{i}.{name}", data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
            proto.data_location = TensorProto.EXTERNAL
            proto.external_data.add(key="location", value="memory")
            protos.append(proto)
            values[f"{i}.{name}"] = ort.OrtValue.ortvalue_from_numpy(array)
        names = [f"{i}.{name}" if name in constants else name for name in input_names(attributes)]
        nodes.append(helper.make_node(OP_TYPE, names, [f"{i}.y", f"{i}.active"], str(i), domain=DOMAIN, **settings))
        outputs.append(helper.make_tensor_value_info(f"{i}.active", TensorProto.INT32, None))
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, d]),
        helper.make_tensor_value_info("load", TensorProto.FLOAT, [1, 1]),
        helper.make_tensor_value_info("threshold", TensorProto.FLOAT, [1]),
    ]
    graph = helper.make_graph(nodes, "stack", inputs, outputs, protos)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(ort_library_path()))
    options.add_external_initializers(list(values), list(values.values()))
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1, 1, d), dtype=np.float32)
    return Stack(session, {"x": x, "load": np.zeros((1, 1), np.float32)}, weight_format, (layers, d, f))


def measure(model: str, weight_format: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a token through all layers, lowest and median, at each share."""
    made = stack(model, weight_format, threads)
    thresholds = {share: made.threshold(share) for share in SKIPPED}
    found = {share: made.run(threshold) for share, threshold in thresholds.items()}
    times: dict[float, list[float]] = {share: [] for share in SKIPPED}
    for _ in range(rounds):
        for share, threshold in thresholds.items():
            made.run(threshold)  # the caches now hold what this variant leaves there
            start = time.perf_counter()
            made.run(threshold)
            times[share].append(1e3 * (time.perf_counter() - start))
    rows = []
    for share, several in times.items():
        low = min(several)
        rows.append(
            {
                "model": model,
                "weight_format": weight_format,
                "threads": threads,
                "skipped": found[share],
                "ms": low,
                "ms_median": statistics.median(several),
                "gb_s": made.bytes(found[share]) / low / 1e6,
            }
        )
    return rows


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=FORMAT_BITS, default=["int4", "int5", "int6", "int8"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "machine": describe(max(arguments.threads)),
        "busy": busy(),
        "library": build_info(ort_library_path()),
        "rows": [],
    }
    for model in arguments.models:
        for weight_format in arguments.formats:
            for threads in arguments.threads:
                for row in measure(model, weight_format, threads, arguments.rounds):
                    results["rows"].append(row)
                    print(
                        f"{model:8} {weight_format} {threads} threads, {100 * row['skipped']:3.0f}% skipped: "
                        f"{row['ms']:7.2f} ms (median {row['ms_median']:.2f}), {row['gb_s']:.1f} GB/s",
                        flush=True,
                    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
