"""Take what tells about the machine that exported out of a graph."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

_TRACE = "stack_trace"


class ForgetMachinePaths(ir.passes.InPlacePass):
    """Drop the stack traces that PyTorch's exporter leaves on nodes: they name files of the machine that exported, and make the
    model file larger."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Look at the nodes of the main graph and of the functions."""
        modified = False
        for node in _nodes(model):
            for key in _traces(node):
                del node.metadata_props[key]
                modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """No node has one."""
        left = next((node for node in _nodes(model) if _traces(node)), None)
        if left is not None:
            raise ir.passes.PostconditionError(f"node {left.name!r} still has a stack trace")


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph
    for function in model.functions.values():
        yield from function


def _traces(node: ir.Node) -> list[str]:
    return [key for key in node.metadata_props if _TRACE in key]
