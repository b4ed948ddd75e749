"""Repack the weights of one FFN to the op's neuron-major layout."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import numpy as np
import onnx_ir as ir

from graph_passes.matchers.common import FFNMatch
from graph_passes.matchers.weights import MatrixSource, VectorSource


def sources(match: FFNMatch) -> Iterator[MatrixSource | VectorSource]:
    """Every constant operand of the layer."""
    for source in (match.gate, match.up, match.down, match.gate_bias, match.up_bias, match.down_bias):
        if source is not None:
            yield source


def weight_key(match: FFNMatch) -> Hashable:
    """Equal for layers that use the same weights."""
    return (match.gated, match.gate, match.up, match.down, match.gate_bias, match.up_bias, match.down_bias, match.has_bias)


def repack(match: FFNMatch, dtype: ir.DataType | None, neurons: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Read the weights of a layer.

    Args:
        dtype: element type of the result; the graph's own when None. Biases are float32: they are small, and the op adds
            them to float32 sums.
        neurons: int64 [f'], the neurons to keep in their new order; all as they are when None.

    Returns:
        `w_in` [f', n, d], `w_out` [f', d] and, with `has_bias`, `gate_bias` [f'] (gated only), `up_bias` [f'], `down_bias` [d];
        copies that hold no reference to the graph's tensors.
    """
    target = (dtype or match.dtype).numpy()
    inner = [match.up] if match.gate is None else [match.gate, match.up]
    chosen = np.arange(match.intermediate_size) if neurons is None else neurons
    w_in = np.empty((len(chosen), len(inner), match.hidden_size), dtype=target)
    for index, source in enumerate(inner):
        w_in[:, index] = source.read().T[chosen] if neurons is not None else source.read().T
    down = match.down.read()
    arrays = {"w_in": w_in, "w_out": np.array(down if neurons is None else down[neurons], dtype=target, order="C")}
    if match.has_bias:
        widths = {"up_bias": match.intermediate_size, "down_bias": match.hidden_size}
        if match.gated:
            widths = {"gate_bias": match.intermediate_size, **widths}
        for name, width in widths.items():
            bias: VectorSource | None = getattr(match, name)
            values = np.zeros(width, np.float32) if bias is None else np.array(bias.read(), dtype=np.float32)
            arrays[name] = values if neurons is None or name == "down_bias" else values[neurons]
    return arrays


def free_unused(graph: ir.Graph, values: Iterator[ir.Value]) -> None:
    """Remove initializers that nothing uses any more, and let go of their data."""
    for value in values:
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            del graph.initializers[str(value.name)]
            value.const_value = None
