"""onnx-ir's inlining of functions, in time linear in what comes out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from clada_export.patches.patch import Patch

PATCH = Patch(
    name="onnx_ir_inlining",
    package="onnx-ir",
    made_for="1.1.0",
    reason="It finds a free name by counting up from 1, so that the n-th call of a function takes n steps for each name.",
    until="the steps of InlinePass are in proportion to the nodes that come out",
)


class InlineFunctions(InlinePass):
    """onnx-ir's pass, which finds a free name by counting up from 1: for the n-th call of a function that takes n steps.

    Here the names in a function are changed before each call to those that it would find.
    """

    def __init__(self) -> None:
        super().__init__()
        self._taken: Counter[tuple[bool, str]] = Counter()
        self._originals: dict[tuple[str, str, str], list[tuple[Any, str]]] = {}

    def _instantiate_call(self, node: ir.Node, call_site_id: str) -> Any:
        key = node.op_identifier()
        if key not in self._originals:
            inner = list(self._functions[key].all_nodes())
            named = [(each, each.name or "node") for each in inner]
            values = [(value, value.name or "val") for each in inner for value in each.outputs]
            self._originals[key] = [*named, *values]
        for item, name in self._originals[key]:
            is_node = isinstance(item, ir.Node)
            # Nodes and values have names of their own each.
            used = self._used_node_names if is_node else self._used_value_names
            number, free = self._taken[is_node, name], name
            while number == self._taken[is_node, name] or free in used:
                number += 1
                free = name if number == 1 else f"{name}_{number}"
            self._taken[is_node, name] = number
            item.name = free
        return super()._instantiate_call(node, call_site_id)
