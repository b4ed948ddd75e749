"""What the files beside a graph say of the model: how long a text may be, how many tokens there are, and which end a text.

They come with the model, and their fields with many conventions: what is no count (-1 for "as long as you like", a name, a
list) says nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clada_export.artifact.manifest import Manifest
from clada_export.errors import UsageError
from clada_export.files.json_files import read_json
from clada_export.runtime.tokens import LARGEST_ID

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class ModelLimits:
    """`max_positions`: the longest sequence in tokens, or None; `vocab_size`: the number of token ids, or None."""

    max_positions: int | None
    vocab_size: int | None
    eos_token_ids: frozenset[int]


def listed_names(manifest: Manifest) -> Collection[str] | None:
    """The files of an export that may be used; None for all, while it is still being written and lists none."""
    return frozenset(manifest.files) or None


def read_limits(folder: Path, manifest: Manifest) -> ModelLimits:
    """Read them.

    Raises:
        UsageError: a file that can't be read, or fewer positions than the graph needs for itself.
    """
    listed = listed_names(manifest)
    config = read_object(folder / "config.json", listed)
    generation = read_object(folder / GENERATION_FILE, listed)
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    stated = _count(config.get("max_position_embeddings"), inner.get("max_position_embeddings"), config.get("n_positions"))
    if stated is not None and stated <= manifest.first_position:
        raise UsageError(
            f"{folder / 'config.json'}: the model has {stated} positions, and the manifest's first_position is "
            f"{manifest.first_position}: none is left; the files do not belong together"
        )
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    return ModelLimits(
        None if stated is None else stated - manifest.first_position,
        _count(_logits_width(manifest), config.get("vocab_size"), inner.get("vocab_size")),
        frozenset(end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int),
    )


def read_object(path: Path, listed: Collection[str] | None) -> dict[str, Any]:
    """A JSON object that may be missing; one that the manifest does not list is taken for missing."""
    if not path.is_file() or (listed is not None and path.name not in listed):
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise UsageError(f"{path}: a JSON object is wanted, and this is {type(value).__name__}")
    return value


def _logits_width(manifest: Manifest) -> int | str | None:
    return next((spec.shape[-1] for spec in manifest.outputs if spec.name == "logits" and spec.shape), None)


def _count(*values: Any) -> int | None:
    return next((value for value in values if type(value) is int and 1 <= value <= LARGEST_ID), None)
