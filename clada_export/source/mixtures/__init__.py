"""Checkpoints that are mixtures of experts already, read as models whose FFNs the op can run: one module a layout."""

from __future__ import annotations

from clada_export.source.mixtures.registry import BLOCK_LAYOUTS, FOLDER_LAYOUTS, folder_layout, import_blocks
from clada_export.source.mixtures.routed_mlp import RoutedMLP, routed_mlps

__all__ = ["BLOCK_LAYOUTS", "FOLDER_LAYOUTS", "RoutedMLP", "folder_layout", "import_blocks", "routed_mlps"]
