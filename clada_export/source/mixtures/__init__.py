"""Checkpoints that are mixtures of experts already, read as models whose FFNs the op can run: one module a layout."""

from __future__ import annotations

from clada_export.methods.imported import (
    check_import,
    ignored_options,
    import_plan,
    is_imported,
    require_dense,
    require_whole,
    takes_experts,
)
from clada_export.source.mixtures.ds_moe import import_blocks
from clada_export.source.mixtures.llama_moe import is_llama_moe, load_llama_moe
from clada_export.source.mixtures.routed_mlp import RoutedMLP, routed_mlps

__all__ = [
    "RoutedMLP",
    "check_import",
    "ignored_options",
    "import_blocks",
    "import_plan",
    "is_imported",
    "is_llama_moe",
    "load_llama_moe",
    "require_dense",
    "require_whole",
    "routed_mlps",
    "takes_experts",
]
