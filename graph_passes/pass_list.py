"""Passes in the order in which they run."""

from __future__ import annotations

import onnx_ir as ir


class PassList(ir.passes.Sequential):
    """Runs passes on a model from the first to the last; each is held to what it states (`onnx_ir.passes.PassBase`):
    `requires` is checked before it runs, `ensures` after.

    Other errors of a pass come out as they are: a `ContractError` is for the one who asked for the rewrite.

    Attributes:
        node_counts: nodes of the main graph after each pass, by the name of its class.

    Raises:
        PreconditionError, PostconditionError: when called; a pass that was not given what it requires, or did not do what it
            ensures, by name and place in the list.
    """

    def __init__(self, *passes: ir.passes.InPlacePass) -> None:
        super().__init__(*passes)
        self.node_counts: dict[str, int] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run them."""
        modified = False
        for place, step in enumerate(self.passes, 1):
            name = type(step).__name__
            try:
                modified |= step(model).modified
            except ir.passes.InvariantError as error:
                raise type(error)(f"{name}, pass {place} of {len(self.passes)}: {error}") from error
            self.node_counts[name] = model.graph.num_nodes()
        return ir.passes.PassResult(model, modified)
