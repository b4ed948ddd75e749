"""Repack the weights of one FFN to the op's neuron-major layout."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from graph_passes.matchers.common import FFNMatch
from graph_passes.matchers.weights import MatrixSource, VectorSource

Source = TypeVar("Source", MatrixSource, VectorSource)


def sources(match: FFNMatch) -> Iterator[MatrixSource | VectorSource]:
    """Every constant operand of the layer."""
    for source in (match.gate, match.up, match.down, match.gate_bias, match.up_bias, match.down_bias):
        if source is not None:
            yield source


def weight_key(match: FFNMatch) -> Hashable:
    """Equal for layers that use the same weights."""
    return (match.gated, match.gate, match.up, match.down, match.gate_bias, match.up_bias, match.down_bias, match.has_bias)


def held(match: FFNMatch) -> FFNMatch:
    """The same layer with constants of its own, which stay when the graph lets go of its initializers. None is read."""
    values: dict[ir.Value, ir.Value] = {}
    return _with_values(match, lambda value: values.setdefault(value, _like(value, value.const_value)))


def packed_shapes(match: FFNMatch, neurons: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what `repack` gives for so many neurons, in its order."""
    shapes: dict[str, tuple[int, ...]] = {
        "w_in": (neurons, 1 if match.gate is None else 2, match.hidden_size),
        "w_out": (neurons, match.hidden_size),
    }
    if match.has_bias:
        shapes |= {"gate_bias": (neurons,)} if match.gated else {}
        shapes |= {"up_bias": (neurons,), "down_bias": (match.hidden_size,)}
    return shapes


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
    # Gate and up may lie in one constant, which is made each time it is read.
    read: dict[ir.Value, ir.Value] = {}
    match = _with_values(match, lambda value: read.setdefault(value, _read(value)))
    target = (dtype or match.dtype).numpy()
    inner = [match.up] if match.gate is None else [match.gate, match.up]
    chosen = np.arange(match.intermediate_size) if neurons is None else neurons
    w_in = np.empty((len(chosen), len(inner), match.hidden_size), dtype=target)
    for index, source in enumerate(inner):
        w_in[:, index] = source.read().T[chosen] if neurons is not None else source.read().T
    down = match.down.read()
    arrays = {"w_in": w_in, "w_out": np.array(down if neurons is None else down[neurons], dtype=target, order="C")}
    for name, values in biases(match).items():
        arrays[name] = values if neurons is None or name == "down_bias" else values[neurons]
    return arrays


def biases(match: FFNMatch) -> dict[str, np.ndarray]:
    """The biases of a layer in float32, zeros for those that it lacks; none without `has_bias`."""
    if not match.has_bias:
        return {}
    widths = {"up_bias": match.intermediate_size, "down_bias": match.hidden_size}
    if match.gated:
        widths = {"gate_bias": match.intermediate_size, **widths}
    found: dict[str, np.ndarray] = {}
    for name, width in widths.items():
        bias: VectorSource | None = getattr(match, name)
        found[name] = np.zeros(width, np.float32) if bias is None else np.array(bias.read(), dtype=np.float32)
    return found


def _with_values(match: FFNMatch, change: Callable[[ir.Value], ir.Value]) -> FFNMatch:
    """The layer with other values behind its sources."""

    def changed(source: Source | None) -> Source | None:
        return None if source is None else replace(source, value=change(source.value))

    return replace(
        match,
        gate=changed(match.gate),
        up=replace(match.up, value=change(match.up.value)),
        down=replace(match.down, value=change(match.down.value)),
        gate_bias=changed(match.gate_bias),
        up_bias=changed(match.up_bias),
        down_bias=changed(match.down_bias),
    )


def _like(value: ir.Value, tensor: ir.TensorProtocol | None) -> ir.Value:
    return ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=tensor)


def _read(value: ir.Value) -> ir.Value:
    tensor = value.const_value
    if tensor is None:
        raise ValueError(f"initializer {value.name!r} has no data any more")
    return _like(value, ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name))


def free_unused(graph: ir.Graph, values: Iterator[ir.Value]) -> None:
    """Remove initializers that nothing uses any more, and let go of their data."""
    for value in values:
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            del graph.initializers[str(value.name)]
            value.const_value = None
