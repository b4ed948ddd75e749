"""Let onnxscript's rewriter compare the operator before it lists the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import _basics, _matcher

from clada_export.patches.patch import Patch

PATCH = Patch(
    name="onnxscript_matcher",
    package="onnxscript",
    made_for="0.7.2",
    reason="For a pattern of several outputs it lists the whole graph once a node and rule, before it compares the first "
    "operator: quadratic in the number of nodes, and half of an export of 30 layers (docs/decisions/0003-tracing.md).",
    until="SimplePatternMatcher.match compares the operator of the node first",
)


@contextlib.contextmanager
def early_reject() -> Iterator[None]:
    """Make the matcher skip, without a look at the graph, nodes that can't begin a pattern of several outputs.

    It can only skip nodes on which the match would fail, so the outcome is the same.
    """
    original = _matcher.SimplePatternMatcher.match

    def match(self: Any, model: Any, graph: Any, node: ir.Node, **options: Any) -> Any:
        if not self.pattern.has_single_output_node:
            first = self.pattern.output_nodes[0].op_identifier()
            if first is not None and first != node.op_identifier():
                return _basics.MatchResult().fail("another operator")
        return original(self, model, graph, node, **options)

    _matcher.SimplePatternMatcher.match = match  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        _matcher.SimplePatternMatcher.match = original  # type: ignore[method-assign]
