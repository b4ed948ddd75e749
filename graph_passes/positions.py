"""Let a graph count positions from 0 whose model counts them from another number."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.emit import initializer, result

POSITIONS = "position_ids"
_FIRST = f"{POSITIONS}.first"


class ShiftPositions(ir.passes.InPlacePass):
    """Add `first` to the input `position_ids`. A graph without this input, or a `first` of 0, is left as it is.

    The one pass that is not to be run twice: it would add twice.

    Args:
        first: the model's own number of a text's first token.
    """

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def requires(self, model: ir.Model) -> None:
        """The positions are not shifted yet."""
        if _FIRST in model.graph.initializers:
            raise ir.passes.PreconditionError(f"the input {POSITIONS!r} is shifted already")

    def ensures(self, model: ir.Model) -> None:
        """One node reads the input, the sum, if there is anything to add."""
        given = _positions(model.graph)
        if given is not None and self.first != 0 and len(given.uses()) > 1:
            raise ir.passes.PostconditionError(f"nodes read the input {POSITIONS!r} as it is given")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Put the sum in the place of the input."""
        graph = model.graph
        given = _positions(graph)
        if given is None or self.first == 0 or not given.uses():
            return ir.passes.PassResult(model, False)
        users = list(given.uses())
        dtype = given.dtype or ir.DataType.INT64
        first = initializer(graph, _FIRST, np.array(self.first, dtype=dtype.numpy()))
        tape = ir.tape.Tape()
        made = result(f"{POSITIONS}.shifted", dtype, given.shape)
        total = tape.op("Add", [given, first], name=f"{POSITIONS}.add", output=made)
        graph.insert_before(graph[0], tape.nodes)
        for node, index in users:
            node.replace_input_with(index, total)
        return ir.passes.PassResult(model, True)


def _positions(graph: ir.Graph) -> ir.Value | None:
    return next((value for value in graph.inputs if value.name == POSITIONS), None)
