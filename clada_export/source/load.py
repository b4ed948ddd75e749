"""The source stage: a Hub id, a local folder, a GGUF file or an ONNX model becomes a float32 model that calibration can run,
with its tokenizer. What transformers makes of it is held to the checkpoint (`clada_export.source.loading`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clada_export.errors import UsageError
from clada_export.foreign import one_line
from clada_export.source.folder import load_folder
from clada_export.source.gguf import load_gguf
from clada_export.source.hub import load_hub_model
from clada_export.source.model import SourceFile, SourceModel, SourceRequest
from clada_export.source.onnx.files import is_onnx
from clada_export.source.onnx.source import load_onnx

__all__ = ["SourceFile", "SourceModel", "load_source", "source_request"]


@dataclass(frozen=True)
class SourceKind:
    """A form in which models come: whether a path is one, and what loads it."""

    holds: Callable[[Path], bool]
    load: Callable[[SourceRequest], SourceModel]


KINDS = (
    SourceKind(lambda path: path.exists() and is_onnx(path), load_onnx),
    SourceKind(lambda path: path.is_file(), load_gguf),
    SourceKind(lambda path: path.is_dir(), load_folder),
    SourceKind(lambda path: True, load_hub_model),
)
"""In the order in which they are asked: what is no path here is a Hub id."""


def load_source(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    import_experts: bool = True,
    dtype: torch.dtype = torch.float32,
) -> SourceModel:
    """Load a decoder LLM for export.

    Args:
        model: a Hub id (`org/name`), a local folder with `config.json` and safetensors, a `.gguf` file, an `.onnx` file or a
            folder that holds one.
        revision: branch, tag or commit of a Hub id.
        token: Hub access token; None uses the stored one.
        cache_dir: where Hub files are kept; None is the Hub's default.
        local_files_only: use the cache only, never the network.
        trust_remote_code: run Python code that comes with the model.
        allow_pickle: accept `pytorch_model.bin` (read with `weights_only=True`).
        import_experts: take routed experts of a known layout as FFNs that the op can run (`moe_import`); without it they stay
            what they are, and the dense FFNs beside them are the model's FFNs.
        dtype: the type of the loaded weights.

    Raises:
        UsageError: no such model, a damaged or incomplete one, or weights that do not fit the config.
        UnsupportedModelError: not a decoder, an architecture unknown to transformers, or weights that are already quantised.
        BackendError: a package that the format needs is missing.
    """
    request = source_request(
        model,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        import_experts=import_experts,
        dtype=dtype,
    )
    return next(kind for kind in KINDS if kind.holds(request.path)).load(request)


def source_request(model: str, **options: Any) -> SourceRequest:
    """What `load_source` was asked for, with the path looked at.

    Raises:
        UsageError: what is there is neither a file nor a folder, or the system can't say.
    """
    path = _path(model)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UsageError(f"{model}: it is neither a file nor a folder")
    return SourceRequest(model, path, **options)


def _path(model: str) -> Path:
    try:
        path = Path(model).expanduser()
        path.exists()  # whether the system can say at all
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{model[:200]!r}: no such file or folder: {one_line(error)}") from error
    return path
