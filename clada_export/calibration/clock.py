"""Check the cost model against the clock: a few of a plan's FFNs, timed alone in ONNX Runtime with our library.

Each layer is a graph of its own: the op as the plan has it, its router included, at load 0, and the same FFN with score `gate`
at load +inf, which computes every neuron. Both read real inputs of that layer, one decoded row a run. Between two runs as many
bytes are read as lie between two visits of a layer in a whole model (up to a limit), so that weights come from memory where
they would. That leaves the code of ONNX Runtime cold too, which it is not in the middle of a model: the time of a call that
computes nothing (load -inf) is taken off both.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import BackendError
from clada_export.native.library import require_ort
from clada_export.op.reference import prompt_shares
from clada_export.op.scorer import layer_tensors
from clada_export.plan.layer import LayerPlan
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.reads import dense_bytes, read_bytes
from clada_export.plan.tensors import LayerTensors
from graph_passes.op import DOMAIN, OP_TYPE, SparseFFNAttributes, input_names, output_names
from graph_passes.router_nodes import emit_router

LAYERS, ROWS = 3, 24
FLUSH_LIMIT = 256 * 2**20
"""Most bytes that are read between two runs."""
_OPSET = 20
_ELEMENTS = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int8: onnx.TensorProto.INT8,
}
_WEIGHTS = ("w_in", "w_out")


@dataclass(frozen=True)
class ClockReading:
    """Bytes and time of some layers, each relative to the same layers dense.

    Attributes:
        layers: their names.
        rows: decoded rows that each was timed on.
        threads: of one session.
        dense_ms, sparse_ms: the sum over the layers of the lower quartile over rows, milliseconds, without `idle_ms`.
        idle_ms: the same of a call that computes nothing.
        bytes: what the cost model says for the neurons that ran.
    """

    layers: tuple[str, ...]
    rows: int
    threads: int
    dense_ms: float
    sparse_ms: float
    idle_ms: float
    bytes: float

    @property
    def clock(self) -> float:
        """Time relative to dense."""
        return self.sparse_ms / self.dense_ms

    def __str__(self) -> str:
        return (
            f"bytes say x{self.bytes:.2f}, the clock says x{self.clock:.2f} "
            f"({_counted(len(self.layers), 'layer')}, {_counted(self.threads, 'thread')})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "layers": list(self.layers), "clock": self.clock, "text": str(self)}


def read_clock(
    plan: SparsityPlan,
    decoder: Decoder,
    window: Tensor,
    prompt: int,
    *,
    dtype: str = "float32",
    layers: int = LAYERS,
    rows: int = ROWS,
    threads: int | None = None,
) -> ClockReading:
    """Time some of a plan's layers.

    Args:
        decoder: with the weights that the plan is for.
        window: int64 [context], a text; its first `prompt` tokens are the prompt, rows are taken from the rest.
        dtype: of the engine's weights.
        layers: how many, spread over the layers' sparsities.
        threads: of a session; None takes one for each core that this process may use.

    Raises:
        BackendError: ONNX Runtime or the library is missing, or fails.
    """
    library = require_ort("timing a layer")
    threads = threads or len(os.sched_getaffinity(0))
    item = int(getattr(torch, dtype).itemsize)
    by_name = {ffn.name: ffn for ffn in decoder.ffns}
    chosen = [(by_name[layer.name], layer) for layer in _spread(plan.layers, layers)]
    inputs = _inputs(decoder, [ffn for ffn, _ in chosen], window)
    flush = _flusher(int(sum(dense_bytes(layer, item) for layer in plan.layers)))
    dense_ms = sparse_ms = idle_ms = read = total = 0.0
    timed = 0
    for (ffn, layer), (x, h) in zip(chosen, inputs, strict=True):
        sparse = _Layer.sparse(plan, ffn, layer, h[:prompt], dtype, library, threads)
        dense = _Layer.dense(ffn, layer, dtype, library, threads)
        places = np.linspace(prompt, len(x) - 1, min(rows, len(x) - prompt)).astype(int)
        timed = len(places)
        times: tuple[list[float], ...] = ([], [], [])
        active = 0
        for number, row in enumerate([places[0], *places]):
            feed = x[int(row)].reshape(1, 1, -1).numpy()
            for taken, run in zip(times, (dense.run, sparse.run, dense.idle), strict=True):
                flush()
                seconds, ran = run(feed)
                # The first row warms all up.
                if number:
                    taken.append(1e3 * seconds)
                    active += ran if taken is times[1] else 0
        with_all, with_some, idle = (_lower_quartile(taken) for taken in times)
        # Of a tiny layer the call is nearly all, and chance must not turn what is left negative.
        idle = min(idle, 0.9 * with_all, 0.9 * with_some)
        dense_ms, sparse_ms, idle_ms = dense_ms + with_all - idle, sparse_ms + with_some - idle, idle_ms + idle
        router = plan.tensors(layer).router
        share = active / (timed * layer.width)
        parameters = 0 if router is None else router.parameters
        read += read_bytes(layer, plan.score, share, item, parameters, plan.attributes(layer).weight_format)
        total += dense_bytes(layer, item)
    return ClockReading(tuple(layer.name for _, layer in chosen), timed, threads, dense_ms, sparse_ms, idle_ms, read / total)


def _spread(layers: Sequence[LayerPlan], count: int) -> list[LayerPlan]:
    """`count` layers at even places in the order of their sparsity, in the model's order."""
    ranked = sorted(range(len(layers)), key=lambda index: layers[index].expected_sparsity)
    count = min(count, len(layers))
    places = sorted({ranked[int((place + 0.5) * len(layers) / count)] for place in range(count)})
    return [layers[place] for place in places]


def _inputs(decoder: Decoder, ffns: Sequence[EagerFFN], window: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The inputs [T, d] and hidden activations [T, f] of some FFNs on a text, float32."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def inner(index: int, x: Tensor, h: Tensor) -> None:
        seen[index] = (x.reshape(-1, x.shape[-1]).float().clone(), h.reshape(-1, h.shape[-1]).float().clone())

    with torch.inference_mode(), decoder.tap(inner=inner, only=ffns):
        decoder.logits(window)
    return [seen[index] for index in range(len(ffns))]


def _flusher(size: int) -> Callable[[], object]:
    buffer = np.ones(max(min(size, FLUSH_LIMIT) // 4, 1), dtype=np.float32)
    return buffer.sum


class _Layer:
    """One FFN in a session of its own."""

    def __init__(
        self,
        attributes: SparseFFNAttributes,
        tensors: dict[str, Tensor],
        arrays: LayerTensors,
        feeds: dict[str, np.ndarray],
        library: Path,
        threads: int,
    ) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        names, values = [], []
        proto = _graph(attributes, arrays, feeds)
        for name, tensor in tensors.items():
            # ONNX's two gigabytes are for a file: the weights are handed over in memory.
            initializer = onnx.TensorProto(name=name, data_type=_ELEMENTS[tensor.dtype], dims=list(tensor.shape))
            initializer.data_location = onnx.TensorProto.EXTERNAL
            initializer.external_data.add(key="location", value="memory")
            proto.graph.initializer.append(initializer)
            names.append(name)
            values.append(_ort_value(tensor))
        try:
            options.register_custom_ops_library(str(library))
            options.add_external_initializers(names, values)
            self._session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ORT's exceptions share no base of their own
            raise BackendError(f"ONNX Runtime {ort.__version__} can't open a single FFN: {error}") from error
        self._feeds = feeds

    @classmethod
    def sparse(
        cls, plan: SparsityPlan, ffn: EagerFFN, layer: LayerPlan, prompt: Tensor, dtype: str, library: Path, threads: int
    ) -> _Layer:
        attributes = replace(plan.attributes(layer), has_bias=ffn.has_bias, emit_active=True)
        arrays = plan.tensors(layer)
        feeds = {"load": np.zeros((1, 1), dtype=np.float32)}
        if attributes.use_stat:
            hidden = prompt if arrays.neurons is None else prompt[:, torch.from_numpy(arrays.neurons)]
            feeds["past_stat"] = prompt_shares(hidden, attributes).sum(0, keepdim=True).numpy()
        threshold = torch.tensor(layer.threshold, dtype=torch.float32)
        tensors = _tensors(ffn, attributes, threshold, dtype, arrays.neurons)
        return cls(attributes, tensors, arrays, feeds, library, threads)

    @classmethod
    def dense(cls, ffn: EagerFFN, layer: LayerPlan, dtype: str, library: Path, threads: int) -> _Layer:
        attributes = SparseFFNAttributes(
            activation=layer.activation, gated=layer.gated, has_bias=ffn.has_bias, emit_active=True
        )
        feeds = {"load": np.full((1, 1), np.inf, dtype=np.float32)}
        return cls(attributes, _tensors(ffn, attributes, torch.zeros(1), dtype, None), LayerTensors(), feeds, library, threads)

    def run(self, x: np.ndarray) -> tuple[float, int]:
        """(seconds, neurons that ran) of one row [1, 1, d]."""
        return self._timed({**self._feeds, "x": x})

    def idle(self, x: np.ndarray) -> tuple[float, int]:
        """The same of a row that is skipped."""
        return self._timed({**self._feeds, "x": x, "load": np.full((1, 1), -np.inf, dtype=np.float32)})

    def _timed(self, feeds: dict[str, np.ndarray]) -> tuple[float, int]:
        start = time.perf_counter()
        try:
            _, active = self._session.run(["y", "active"], feeds)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in a single FFN: {error}") from error
        return time.perf_counter() - start, int(np.asarray(active).sum())


def _tensors(
    ffn: EagerFFN, attributes: SparseFFNAttributes, threshold: Tensor, dtype: str, neurons: np.ndarray | None
) -> dict[str, Tensor]:
    made = layer_tensors(ffn, attributes.score, threshold, neurons=neurons)
    found: dict[str, Tensor] = {}
    for name in input_names(attributes):
        value = getattr(made, name, None)
        if isinstance(value, Tensor):
            value = value.detach().to(getattr(torch, dtype)) if name in _WEIGHTS else value.detach()
            found[name] = value.contiguous()
    return found


def _graph(attributes: SparseFFNAttributes, arrays: LayerTensors, feeds: dict[str, np.ndarray]) -> onnx.ModelProto:
    """One op, and before it its router if it has one; the constants that are not the router's are missing."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, None, None]))
    values = {"x": x}
    for name, array in feeds.items():
        values[name] = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None] * array.ndim))
    constants: list[ir.Value] = []

    def initializer(name: str, array: np.ndarray) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        constants.append(value)
        return value

    nodes: list[ir.Node] = []
    inputs = list(values.values())
    if arrays.router is not None:
        nodes, values["score"] = emit_router(arrays.router, x, values["load"], "router", initializer)
    operands = [values.get(name) or ir.Value(name=name) for name in input_names(attributes)]
    names = output_names(attributes)
    node = ir.node(OP_TYPE, operands, attributes.to_onnx(), domain=DOMAIN, num_outputs=len(names), name="ffn")
    for output, name in zip(node.outputs, names, strict=True):
        output.name = name
        output.type = ir.TensorType(ir.DataType.INT32 if name == "active" else ir.DataType.FLOAT)
    outputs = [output for output in node.outputs if output.name in ("y", "active")]
    graph = ir.Graph(
        inputs, outputs, nodes=[*nodes, node], initializers=constants, opset_imports={"": _OPSET, DOMAIN: 1}, name="ffn"
    )
    return ir.to_proto(ir.Model(graph, ir_version=10))


def _ort_value(tensor: Tensor) -> Any:
    import onnxruntime as ort

    if tensor.dtype == torch.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.uint16).numpy(), _ELEMENTS[torch.bfloat16])
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _lower_quartile(times: Sequence[float]) -> float:
    """Other work on the machine only ever adds time, so the middle says less."""
    return float(np.quantile(times, 0.25))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
