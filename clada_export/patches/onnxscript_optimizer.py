"""Look at an exporter's graph between its translation and its optimisation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer

from clada_export.patches.patch import Patch

PATCH = Patch(
    name="onnxscript_optimizer",
    package="onnxscript",
    made_for="0.7.2",
    reason="What becomes of a weight can be recorded only from before constants are folded, and torch.onnx.export hands out "
    "its graph afterwards (docs/decisions/0013-trace.md).",
    until="transformers' OnnxExporter, or torch.onnx.export, calls something of its caller's before it optimises",
)


@contextlib.contextmanager
def before_optimising(look: Callable[[ir.Graph], None] | None) -> Iterator[None]:
    """Show a graph to `look` before it is first optimised; what `look` changes of it counts. None changes nothing."""
    original = onnxscript.optimizer.optimize_ir
    shown: list[ir.Model] = []

    def optimize_ir(model: ir.Model, *args: Any, **options: Any) -> None:
        if look is not None and not shown:
            shown.append(model)
            look(model.graph)
        original(model, *args, **options)

    onnxscript.optimizer.optimize_ir = optimize_ir
    try:
        yield
    finally:
        onnxscript.optimizer.optimize_ir = original
