"""Let a graph count positions from 0 whose model counts them from another number."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.emit import initializer, result

POSITIONS = "position_ids"


class ShiftPositions(ir.passes.InPlacePass):
    """Add `first` to the input `position_ids`. A graph without this input, or a `first` of 0, is left as it is.

    Args:
        first: the model's own number of a text's first token.
    """

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Put the sum in the place of the input."""
        graph = model.graph
        given = next((value for value in graph.inputs if value.name == POSITIONS), None)
        if given is None or self.first == 0 or not given.uses():
            return ir.passes.PassResult(model, False)
        users = list(given.uses())
        dtype = given.dtype or ir.DataType.INT64
        first = initializer(graph, f"{POSITIONS}.first", np.array(self.first, dtype=dtype.numpy()))
        tape = ir.tape.Tape()
        made = result(f"{POSITIONS}.shifted", dtype, given.shape)
        total = tape.op("Add", [given, first], name=f"{POSITIONS}.add", output=made)
        graph.insert_before(graph[0], tape.nodes)
        for node, index in users:
            node.replace_input_with(index, total)
        return ir.passes.PassResult(model, True)
