"""A 16-bit graph on a CPU: its values widened to float32.

ONNX Runtime has no bfloat16 arithmetic on a CPU, and around a float16 operator of ours it puts casts for every input, the
shadow's scales too, which the op refuses. Weights, thresholds and wiring of the widened graph are the graph's own, and every
16-bit number is a float32 number, so what is left out is only the rounding of activations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graph_passes.emit import attribute_values
from graph_passes.op import DOMAIN, SparseFFNAttributes, input_names

NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
WIDE = ir.DataType.FLOAT


def write_widened(model: Path, folder: Path) -> None:
    """Write `model` with float32 in place of 16-bit types to `folder`, under its own name. The shadow's scales stay float16."""
    graph = ir.load(model)
    kept = {value for node in graph.graph if node.domain == DOMAIN for value in _float16_by_contract(node)}
    for part in (graph.graph, *(function.graph for function in graph.functions.values())):
        _widen_graph(part, kept)
    ir.save(graph, folder / model.name, external_data=f"{model.name}.data")


def _float16_by_contract(node: ir.Node) -> list[ir.Value | None]:
    attributes = SparseFFNAttributes.from_onnx(attribute_values(node))
    named = zip(input_names(attributes), node.inputs, strict=True)
    return [value for name, value in named if name == "shadow_scale"]


def _widen_graph(graph: ir.Graph, kept: set[ir.Value | None]) -> None:
    for value in (*graph.inputs, *graph.initializers.values()):
        if value not in kept:
            _widen_value(value)
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.outputs:
            _widen_value(value)
        for key, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in NARROW:
                node.attributes[key] = ir.AttrTensor(key, _wide(attribute.value))
            elif key in ("to", "dtype") and attribute.value in NARROW:
                node.attributes[key] = ir.AttrInt64(key, int(WIDE))


def _widen_value(value: ir.Value) -> None:
    if value.dtype in NARROW:
        value.type = ir.TensorType(WIDE)
    if value.const_value is not None and value.const_value.dtype in NARROW:
        value.const_value = _wide(value.const_value)


def _wide(tensor: Any) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype(np.float32)),
        dtype=WIDE,
        shape=tensor.shape,
        name=tensor.name,
        cache=False,
    )
