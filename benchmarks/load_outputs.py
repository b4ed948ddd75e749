"""What the load signal costs a decode step: computed by the graph, or by the runtime from all logits.

A graph of one LM head (hidden size x vocabulary), with and without the outputs `log_sum_exp` and `entropy`; turns are taken in
rounds, so that noise of the machine meets all alike.

    python -m benchmarks.load_outputs --hidden-size 576 --vocabulary 49152
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from clada_export.load.signal import LoadSignal
from clada_export.runtime import LoadMeter
from graph_passes import AddLoadOutputs


def head(hidden_size: int, vocabulary: int) -> ir.Model:
    """logits = x W with random W."""
    weight = (np.random.default_rng(0).normal(size=(hidden_size, vocabulary)) / hidden_size**0.5).astype(np.float32)
    w = ir.Value(
        name="weight", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(weight.shape), const_value=ir.Tensor(weight)
    )
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch_size", 1, hidden_size]))
    node = ir.node("MatMul", [x, w], name="head")
    logits = node.outputs[0]
    logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["batch_size", 1, vocabulary])
    return ir.Model(ir.Graph([x], [logits], nodes=[node], initializers=[w], opset_imports={"": 20}, name="head"), ir_version=10)


def measure(hidden_size: int, vocabulary: int, rounds: int, threads: int) -> dict[str, float]:
    """Milliseconds a step, medians over the rounds."""
    plain, extended = head(hidden_size, vocabulary), head(hidden_size, vocabulary)
    AddLoadOutputs()(extended)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    without, with_outputs = (
        ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
        for model in (plain, extended)
    )
    x = np.random.default_rng(1).normal(size=(1, 1, hidden_size)).astype(np.float32) * 3
    meter = LoadMeter(LoadSignal())
    logits, log_sum_exp, entropy = with_outputs.run(None, {"x": x})
    last, token = logits[:, -1], [7]
    turns: dict[str, Callable[[], object]] = {
        "graph": lambda: without.run(None, {"x": x}),
        "graph with load outputs": lambda: with_outputs.run(None, {"x": x}),
        "meter from logits": lambda: meter.update(last, token),
        "meter from load outputs": lambda: meter.update(last, token, log_sum_exp=log_sum_exp, entropy=entropy),
    }
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 5):
        for name, turn in turns.items():
            before = time.perf_counter()
            turn()
            if number >= 5:
                times[name].append((time.perf_counter() - before) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    print(json.dumps(measure(options.hidden_size, options.vocabulary, options.rounds, options.threads), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
