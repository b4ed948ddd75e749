"""What a source has besides its weights: tokenizer, licence, and the files that describe it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from transformers import PreTrainedConfig, PreTrainedModel

from clada_export.errors import CladaError
from clada_export.foreign import MODEL_CARD, reading
from clada_export.source.model import SourceFile
from clada_export.source.pretrained import load_tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    *_TOKENIZER_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def digests(folder: Path, weights: Iterable[Path]) -> dict[str, SourceFile]:
    """The weight files of a folder and what describes them there, by their path in it.

    Args:
        weights: files in the folder.
    """
    described = [folder / name for name in _DESCRIPTION_FILES if (folder / name).is_file()]
    return {str(file.relative_to(folder)): digest_file(file) for file in sorted([*weights, *described])}


def folder_tokenizer(folder: Path, name: str, warnings: list[str], **arguments: Any) -> Any:
    """The tokenizer of a folder; None if it has none or it can't be loaded, and a warning then.

    Args:
        name: the model's, for the warning.
        arguments: of `load_tokenizer`.
    """
    if any((folder / file).is_file() for file in _TOKENIZER_FILES) or any(folder.glob("*.tiktoken")):
        return tokenizer_at(str(folder), warnings, **arguments)
    warnings.append(f"{name} has no tokenizer files; prompts will have to be token ids")
    return None


def tokenizer_at(location: str, warnings: list[str], **arguments: Any) -> Any:
    """The tokenizer at a place that has one; None and a warning if it can't be loaded."""
    try:
        return load_tokenizer(location, **arguments)
    except CladaError as error:
        warnings.append(f"the tokenizer can't be loaded ({error}); prompts will have to be token ids")
        return None


def check_vocabulary(model: PreTrainedModel, tokenizer: Any, warnings: list[str]) -> None:
    """Warn of tokens that the model has no embedding of."""
    embeddings = model.get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", None)
    if tokenizer is not None and rows is not None and len(tokenizer) > rows:
        warnings.append(f"the tokenizer has {len(tokenizer)} tokens and the model {rows}; text that uses the others will fail")


def license_of(folder: Path, config: PreTrainedConfig, warnings: list[str]) -> str | None:
    """What the configuration or the model card says; None if they say nothing."""
    readme = folder / "README.md"
    value: Any = getattr(config, "license", None)
    if value is None and readme.is_file():
        try:
            with reading(MODEL_CARD, readme):
                value = (metadata_load(readme) or {}).get("license")
        except CladaError as error:
            warnings.append(f"no licence is recorded: {error}")
    return value if isinstance(value, str) else None


def digest_file(path: Path) -> SourceFile:
    """A file, hashed."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return SourceFile(digest, path.stat().st_size)
