"""onnxscript's constant folding, open to bounds and without names that grow."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.optimizer import FOLDED_FROM_KEY
from onnxscript.optimizer._constant_folding import FoldConstantsPass

from clada_export.patches.patch import Patch

PATCH = Patch(
    name="onnxscript_folding",
    package="onnxscript",
    made_for="0.7.2",
    reason="The pass is not public, bounds the size of a constant only once it has computed it, and keeps with each constant "
    "the names of all that it was made of: a list that grows with every step of a chain.",
    until="onnxscript.optimizer offers the pass, and a constant's metadata does not grow along a chain",
)


class FoldConstants(FoldConstantsPass):
    """The pass, for subclasses that bound it in `process_node` and by `should_fold`; it keeps no names of what was folded."""

    def replace_node(self, node: ir.Node, replacement: Any, *arguments: Any) -> None:
        """Replace a node; what the new values were made of is not kept."""
        super().replace_node(node, replacement, *arguments)
        for value in replacement.new_outputs:
            if value is not None:
                value.meta.pop(FOLDED_FROM_KEY, None)
                value.metadata_props.pop(FOLDED_FROM_KEY, None)
