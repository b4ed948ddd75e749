"""The graph for an engine without our plugin: every `SparseFFN` as the nodes of its function body."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from graph_passes.emit import initializer, result


def write_inlined(model: Path, out: Path) -> None:
    """Write `model` with its functions inlined to `out`, a file in the same folder: both read the same weight file.

    TensorRT expands functions itself, but it refuses an 8-bit constant (the shadow) before anything but a plugin or a
    DequantizeLinear, and a DequantizeLinear in a function that is used twice. So the casts of 8-bit constants become
    DequantizeLinear nodes with scale 1 here: the same numbers.
    """
    graph = InlinePass()(ir.load(model)).model
    for node in list(graph.graph):
        source = node.inputs[0] if node.op_type == "Cast" and node.domain == "" else None
        if source is None or source.dtype != ir.DataType.INT8 or not source.is_initializer():
            continue
        one = initializer(graph.graph, "clada.one", np.array(1, np.float32))
        tape = ir.tape.Tape()
        made = result(node.outputs[0].name, ir.DataType.FLOAT, source.shape)
        tape.op("DequantizeLinear", [source, one], name=f"{node.name}.dequantize", output=made)
        graph.graph.insert_before(node, tape.nodes)
        node.outputs[0].replace_all_uses_with(made)
        graph.graph.remove(node, safe=True)
    ir.save(graph, out)
