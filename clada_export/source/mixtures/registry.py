"""The layouts of mixtures that are read, by the name that a `RoutedMLP` and a plan keep; each is a module, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from clada_export.source.config_file import Stored
from clada_export.source.mixtures import ds_moe, llama_moe


@dataclass(frozen=True)
class FolderLayout:
    """A folder that transformers can't read.

    Attributes:
        matches: whether a folder is of it.
        load: reads a folder's weight files into a model of transformers, its FFNs `RoutedMLP`.
    """

    name: str
    matches: Callable[[Path], bool]
    load: Callable[[Path, Sequence[Path], Stored, torch.dtype], PreTrainedModel]


@dataclass(frozen=True)
class BlockLayout:
    """Blocks of a model that transformers can read; `replace` puts `RoutedMLP` in their place and returns their paths.

    It calls its second argument with each of them before it makes the next.
    """

    name: str
    replace: Callable[[nn.Module, Callable[[nn.Module], None]], tuple[str, ...]]


FOLDER_LAYOUTS = (FolderLayout(llama_moe.LAYOUT, llama_moe.is_llama_moe, llama_moe.load_llama_moe),)
BLOCK_LAYOUTS = (BlockLayout(ds_moe.LAYOUT, ds_moe.import_blocks),)


def folder_layout(folder: Path) -> FolderLayout | None:
    """The layout of a folder, or None if transformers reads it."""
    return next((layout for layout in FOLDER_LAYOUTS if layout.matches(folder)), None)


def import_blocks(model: nn.Module, settle: Callable[[nn.Module], None] = lambda module: None) -> tuple[str, ...]:
    """Replace every block of a known layout by a `RoutedMLP`, in place.

    Args:
        settle: called with each `RoutedMLP`, to move its weights, before the next is made.

    Returns:
        The blocks' paths. Blocks that are built or gated in another way stay as they are.
    """
    return tuple(path for layout in BLOCK_LAYOUTS for path in layout.replace(model, settle))
