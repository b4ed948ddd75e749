"""Time QuantMatMul on the shapes of whole decoders, beside a plain read of the same bytes and ONNX Runtime's MatMulNBits.

All layers run in sequence, so weights come from where they would in a model. Every variant runs in turn, round after round, so
that a slow moment of the machine hits all of them.

    python -m benchmarks.quant_kernel --models smollm2 qwen --threads 1 2 --json results.json
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from benchmarks.environment import busy, describe
from clada_export.native.library import build_info, ort_library_path
from graph_passes.quant.contract import DOMAIN, OP_TYPE
from graph_passes.quant.op import QuantMatMulAttributes, record_bytes, weight_shape


@dataclass(frozen=True)
class Model:
    """The matrices of one layer, as (N, K) and how often, and how many layers there are."""

    layers: int
    matrices: tuple[tuple[int, int, int], ...]


MODELS = {
    "smollm2": Model(30, ((576, 576, 2), (192, 576, 2), (1536, 576, 2), (576, 1536, 1))),
    "qwen": Model(28, ((1536, 1536, 2), (256, 1536, 2), (8960, 1536, 2), (1536, 8960, 1))),
}
"""SmolLM2-135M and Qwen2.5-Coder-1.5B: q and o, k and v, gate and up, down. Their heads are as one more such matrix."""
FORMATS = (8, 6, 5, 4)
PEERS = {8: 8, 4: 4}
"""Bits of MatMulNBits, block 32, accuracy level 4 (activations in 8 bits, as here)."""


@dataclass(frozen=True)
class Stack:
    """Nodes one after the other: each reads an x of its width and adds nothing to the next. `bytes` of weights."""

    session: ort.InferenceSession
    feeds: dict[str, np.ndarray]
    bytes: int

    def run(self) -> None:
        self.session.run(None, self.feeds)


def _stack(model: Model, rows: int, threads: int, library: bool, make_node: Any) -> Stack:
    """`make_node(name, n, k)` gives a node from x{k} to {name}.y, and its constants by name."""
    nodes, protos, values, outputs = [], [], {}, []
    for layer in range(model.layers):
        for place, (n, k, count) in enumerate(model.matrices):
            for copy in range(count):
                name = f"{layer}.{place}.{copy}"
                node, constants = make_node(name, n, k)
                nodes.append(node)
                for key, array in constants.items():
                    proto = TensorProto(
                        name=key, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=list(array.shape)
                    )
                    proto.data_location = TensorProto.EXTERNAL
                    proto.external_data.add(key="location", value="memory")
                    protos.append(proto)
                    values[key] = ort.OrtValue.ortvalue_from_numpy(array)
                outputs.append(helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None))
    widths = sorted({k for _, k, _ in model.matrices})
    inputs = [helper.make_tensor_value_info(f"x{k}", TensorProto.FLOAT, [rows, k]) for k in widths]
    graph = helper.make_graph(nodes, "stack", inputs, outputs, protos)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait for the session's next call would take the cores from the variant whose turn it is.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if library:
        options.register_custom_ops_library(str(ort_library_path()))
    options.add_external_initializers(list(values), list(values.values()))
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    feeds = {f"x{k}": generator.standard_normal((rows, k), dtype=np.float32) for k in widths}
    size = sum(array.numpy().nbytes for array in values.values())
    return Stack(session, feeds, size)


def _random_bytes(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Aligned to lines, as ONNX Runtime allocates what it loads; in memory of its own, which may lie on large pages.

    No two weights may be equal: ONNX Runtime keeps one packed copy of those that are, which then is in a cache for all of them.
    """
    size = int(np.prod(shape))
    memory = np.empty(size + 64, np.uint8)
    at = -memory.ctypes.data % 64
    array = memory[at : at + size]
    array[:] = np.frombuffer(generator.bytes(size), np.uint8)
    return array.reshape(shape)


def ours(model: Model, bits: int, rows: int, threads: int) -> Stack:
    """Random codes; scales of 1 / 128."""
    generator = np.random.default_rng(bits)
    half = np.frombuffer(np.full(32, 1 / 128, np.float16).tobytes(), np.uint8)

    def make_node(name: str, n: int, k: int) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
        attributes = QuantMatMulAttributes(n, bits)
        weight = _random_bytes(weight_shape(attributes, k), generator)
        weight[..., record_bytes(bits, False) - len(half) :] = half
        inputs = [f"x{k}", f"{name}.weight"]
        node = helper.make_node(OP_TYPE, inputs, [f"{name}.y"], name, domain=DOMAIN, **attributes.to_onnx())
        return node, {f"{name}.weight": weight}

    return _stack(model, rows, threads, True, make_node)


def peer(model: Model, bits: int, rows: int, threads: int) -> Stack:
    """`com.microsoft::MatMulNBits`; its scales are float32, as its kernels for float32 activations want."""
    generator = np.random.default_rng(bits)

    def make_node(name: str, n: int, k: int) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
        constants = {
            f"{name}.weight": _random_bytes((n, k // 32, 32 * bits // 8), generator),
            f"{name}.scale": np.full((n, k // 32), 1 / 128, np.float32),
        }
        node = helper.make_node(
            "MatMulNBits", [f"x{k}", *constants], [f"{name}.y"], name, domain="com.microsoft",
            N=n, K=k, bits=bits, block_size=32, accuracy_level=4,
        )  # fmt: skip
        return node, constants

    return _stack(model, rows, threads, False, make_node)


class Read:
    """As many bytes, each once, a part a thread: the largest 64-bit word, which NumPy finds faster than memory gives them."""

    def __init__(self, size: int, threads: int) -> None:
        each = size // threads // 64 * 64
        self.bytes = each * threads
        generator = np.random.default_rng(size)
        self.parts = [_random_bytes((each,), generator).view(np.int64) for _ in range(threads)]
        self.pool = ThreadPoolExecutor(threads)

    def run(self) -> None:
        for _ in self.pool.map(np.max, self.parts):
            pass


def rounds(variants: dict[str, Any], count: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds, and seconds of processors, of each run, the variants in turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for turn in range(count + 1):
        for name, variant in variants.items():
            start = time.perf_counter(), time.process_time()
            variant.run()
            if turn:  # the first round warms up
                times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return times


def measure(model_name: str, threads: int, rows: int, count: int, peers: bool) -> Iterator[dict[str, Any]]:
    """One line for each format, with a read of the same bytes and the peer of the same bits in the same rounds."""
    model = MODELS[model_name]
    for bits in FORMATS:
        stack = ours(model, bits, rows, threads)
        variants: dict[str, Any] = {"quant_matmul": stack, "read": Read(stack.bytes, threads)}
        if peers and bits in PEERS:
            variants["matmul_nbits"] = peer(model, bits, rows, threads)
        times = rounds(variants, count)
        line: dict[str, Any] = {"model": model_name, "threads": threads, "rows": rows, "bits": bits}
        for name, pairs in times.items():
            (seconds, processors), size = zip(*pairs, strict=True), variants[name].bytes
            best = min(seconds)
            line[name] = {
                "ms": round(best * 1e3, 3),
                "ms_median": round(statistics.median(seconds) * 1e3, 3),
                "mb": round(size / 1e6, 1),
                "gb_s": round(size / best / 1e9, 2),
            }
            if threads == 1:  # what a busy machine leaves to compare; waiting threads of a pool would count as busy
                line[name]["cpu_ms"] = round(min(processors) * 1e3, 3)
        key = "cpu_ms" if threads == 1 else "ms"
        speeds = {name: variants[name].bytes / line[name][key] for name in times}
        line["of_read"] = round(speeds["quant_matmul"] / speeds["read"], 3)
        yield line
        del stack, variants
        gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rows", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-peers", action="store_true", help="without MatMulNBits")
    parser.add_argument("--json", type=Path, help="where the results go; they are printed too")
    arguments = parser.parse_args()
    library = build_info(ort_library_path())
    result: dict[str, Any] = {**describe(max(arguments.threads)), "library": library, "busy": round(busy(), 2), "lines": []}
    for model in arguments.models:
        for threads in arguments.threads:
            for rows in arguments.rows:
                for line in measure(model, threads, rows, arguments.rounds, not arguments.no_peers):
                    result["lines"].append(line)
                    print(json.dumps(line), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
