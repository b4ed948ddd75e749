"""All patches."""

from __future__ import annotations

from clada_export.patches import (
    gguf_reader,
    onnx_ir_inlining,
    onnxscript_folding,
    onnxscript_matcher,
    onnxscript_optimizer,
    torch_pytree,
)
from clada_export.patches.patch import Patch

PATCHES: tuple[Patch, ...] = (
    gguf_reader.PATCH,
    onnx_ir_inlining.PATCH,
    onnxscript_folding.PATCH,
    onnxscript_matcher.PATCH,
    onnxscript_optimizer.PATCH,
    torch_pytree.PATCH,
)
