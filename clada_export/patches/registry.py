"""All patches."""

from __future__ import annotations

from clada_export.patches import (
    gguf_reader,
    gguf_weights,
    onnx_ir_inlining,
    onnxscript_folding,
    onnxscript_matcher,
    onnxscript_optimizer,
    torch_pytree,
    transformers_loading,
)
from clada_export.patches.patch import Patch

PATCHES: tuple[Patch, ...] = (
    gguf_reader.PATCH,
    gguf_weights.PATCH,
    onnx_ir_inlining.PATCH,
    onnxscript_folding.PATCH,
    onnxscript_matcher.PATCH,
    onnxscript_optimizer.PATCH,
    torch_pytree.PATCH,
    transformers_loading.PATCH,
)
