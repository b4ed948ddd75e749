"""What the source stage takes and gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from clada_export.decoder.decoder import Decoder
from clada_export.errors import UsageError


@dataclass(frozen=True)
class SourceRequest:
    """A model that is to be loaded; the fields are the arguments of `clada_export.source.load.load_source`.

    `path` is `model` as a path, whether there is one or not.
    """

    model: str
    path: Path
    revision: str | None = None
    token: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    import_experts: bool = True
    dtype: torch.dtype = torch.float32

    def refuse_revision(self, place: str, what: str) -> None:
        """Raise UsageError if there is a revision, which nothing but the Hub has.

        Args:
            place: for the message.
            what: is at it.
        """
        if self.revision is not None:
            raise UsageError(f"{place}: a revision ({self.revision!r}) belongs to a Hub id, and this is a local {what}")


@dataclass(frozen=True)
class SourceFile:
    """A file of the source: the hexadecimal sha256 of its bytes, and how many there are."""

    sha256: str
    bytes: int


@dataclass
class SourceModel:
    """A loaded decoder.

    `decoder` is in eval mode; `tokenizer` is None when the source has none (then `warnings` says so). `name` is the Hub id, the
    folder's name or the file's stem; `kind` is `hub`, `folder`, `gguf` or `onnx`; `revision` is the commit of a Hub source.
    `files` maps paths relative to `path` to their digests; `weights_digest` is over the weights as loaded. `source_dtype` is
    the type most weights are stored in: `float32`, `bfloat16`, `float16`, or a GGUF type such as `Q4_1`. `graph` is the ONNX
    file that is compiled as it is; None where the model is traced.
    """

    decoder: Decoder
    tokenizer: Any
    name: str
    revision: str | None
    kind: str
    path: Path
    files: dict[str, SourceFile]
    weights_digest: str
    license: str | None
    source_dtype: str
    warnings: list[str] = field(default_factory=list)
    graph: Path | None = None

    def record(self) -> dict[str, Any]:
        """What the manifest keeps of it (`source` in `docs/manifest.md`)."""
        return {
            "name": self.name,
            "kind": self.kind,
            "revision": self.revision,
            "weights_digest": self.weights_digest,
            "files": {name: asdict(file) for name, file in self.files.items()},
            "license": self.license,
            "dtype": self.source_dtype,
        }
