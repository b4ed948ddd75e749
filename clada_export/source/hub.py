"""A model on the Hugging Face Hub: download what an export needs, or find it in the cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from clada_export.errors import UsageError
from clada_export.source.folder import read_folder
from clada_export.source.model import SourceModel, SourceRequest
from clada_export.source.weight_files import PICKLE_SUFFIXES, SAFETENSORS, has_weights

_TEXT_PATTERNS = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "README.md", "LICENSE*"]
_SAFETENSORS_PATTERNS = ["model.safetensors", "model-*.safetensors"]
_PICKLE_PATTERNS = ["pytorch_model.bin", "pytorch_model-*.bin"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def load_hub_model(request: SourceRequest) -> SourceModel:
    """The model of a repository on the Hub.

    Raises:
        UsageError: no such repository, or it can't be reached; else see `clada_export.source.folder.read_folder`.
    """
    folder = fetch(request)
    return read_folder(request, folder, name=request.model, kind="hub", place=request.model, revision=folder.name)


def fetch(request: SourceRequest) -> Path:
    """Download (or find in the cache) what an export needs of a Hub repository; returns the snapshot's folder."""
    model = request.model
    looks_like_path = model.startswith((".", "~", "/")) or model.endswith((".gguf", ".safetensors", *PICKLE_SUFFIXES))
    if looks_like_path or not _HUB_ID.fullmatch(model):
        raise UsageError(
            f"{model!r}: no such file or folder, and not a Hub id; give a folder, a .gguf file, or an id such as org/name"
        )
    arguments: dict[str, Any] = {
        "revision": request.revision,
        "token": request.token,
        "cache_dir": request.cache_dir,
        "local_files_only": request.local_files_only,
    }
    patterns = [*_TEXT_PATTERNS, *_SAFETENSORS_PATTERNS, *(["*.py"] if request.trust_remote_code else [])]
    with _hub_errors(model, request.revision):
        folder = Path(snapshot_download(model, allow_patterns=patterns, **arguments))
        if request.allow_pickle and not has_weights(folder, SAFETENSORS):
            folder = Path(snapshot_download(model, allow_patterns=[*patterns, *_PICKLE_PATTERNS], **arguments))
    return folder


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        raise UsageError(
            f"{model}: the Hub asks for permission; accept the model's terms on its page and pass a token (`hf auth login`)"
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"{model}: no such folder here and no such model on the Hub (or a private one: pass a token)"
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{model}: the Hub has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        raise UsageError(
            f"{model}: no such folder here, not in the local cache, and the Hub was not asked or can't be reached; "
            "check the spelling and the network, or download it first (`hf download`)"
        ) from error
    except HFValidationError as error:
        raise UsageError(f"{model!r}: no such file or folder, and not a Hub id: {error}") from error
    except (HfHubHTTPError, OSError) as error:
        raise UsageError(f"{model}: the Hub can't be reached: {error}") from error
