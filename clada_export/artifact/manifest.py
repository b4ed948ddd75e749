"""`Manifest`: what an export folder is, as JSON (`clada.json`). The format is documented in `docs/manifest.md`.

It holds no times and no machine paths, so that two exports with the same pins are the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from clada_export.artifact.manifest_schema import (
    CACHE_DTYPES,
    CACHE_ROLES,
    MANIFEST_SCHEMA,
    MANIFEST_VERSION,
    TARGETS,
)
from clada_export.decoder.padding_kinds import PADDINGS
from clada_export.errors import UsageError
from clada_export.files.check import ListedFiles
from clada_export.files.json_files import read_json, validate_json
from clada_export.load.signal import LoadSignal
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.schema import LARGEST_SIZE

__all__ = [
    "CACHE_DTYPES",
    "CACHE_ROLES",
    "MANIFEST_NAME",
    "MANIFEST_SCHEMA",
    "MANIFEST_VERSION",
    "PADDINGS",
    "TARGETS",
    "CacheTensor",
    "Manifest",
    "TensorSpec",
    "file_record",
    "read_manifest",
    "write_manifest",
]

MANIFEST_NAME = "clada.json"

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*")


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output. `dtype` is a NumPy name (`float32`); `shape` has integers and names of free axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class CacheTensor:
    """State that one step hands to the next: output `present` becomes input `past`.

    `role` is `key`, `value` or `stat` (the prompt statistic of a SparseFFN). In `shape` the first axis is the number
    of sequences; any other axis with a name grows, and is 0 before the first step. A key or value is
    [batch_size, heads, past_sequence_length, head_dim]. With `in_place` that axis may be longer than what it holds, and `past`
    and `present` may be one buffer: the graph takes the number of tokens from `attention_mask`, and writes behind them.
    """

    layer: int
    role: str
    past: str
    present: str
    dtype: str
    shape: tuple[int | str, ...]
    in_place: int | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about an export. `files` is filled in by `ArtifactWriter.commit`.

    `padding` is one of `PADDINGS`. `first_position` is what the graph adds to `position_ids`: the model has as many positions
    less. `ffn_runs` says how often a token runs each FFN that it runs more than once. `weights` says how the matrices are
    quantised, and is empty where they are not. `engine` is what a TensorRT export has
    beside the graph: backend, files, profiles, plugin; see `docs/manifest.md`.
    """

    tool_version: str
    source: dict[str, Any]
    target: str
    op: dict[str, Any]
    plan: dict[str, Any]
    load_signal: LoadSignal
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dtype: str
    cache: tuple[CacheTensor, ...]
    versions: dict[str, str]
    library: str | None = None
    engine: dict[str, Any] | None = None
    model: str = "model.onnx"
    verification: dict[str, Any] = field(default_factory=dict)
    drift: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    tokenizer: bool = False
    padding: str = "left"
    first_position: int = 0
    ffn_runs: dict[str, int] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    schema_version: int = MANIFEST_VERSION

    @property
    def digest(self) -> str:
        """The sha256 of the canonical JSON of all other fields."""
        return _digest(self._content())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, `digest` included."""
        content = self._content()
        return {**content, "digest": _digest(content)}

    def sparsity_plan(self, folder: Path | None = None) -> SparsityPlan:
        """The plan as an object.

        Args:
            folder: the export; the plan's arrays (routers, neuron orders) are read from it. None leaves them out.

        Raises:
            UsageError: the plan is not one, or its arrays are missing or another plan's.
        """
        return SparsityPlan.from_dict(self.plan, origin=f"{MANIFEST_NAME}: plan", folder=folder)

    def listed(self, folder: Path) -> ListedFiles:
        """The files of an export with this manifest, to be checked or read."""
        return ListedFiles(folder, self.files, self.library)

    def with_files(self, files: dict[str, dict[str, Any]]) -> Manifest:
        """The same manifest with other files."""
        return replace(self, files=files)

    def _content(self) -> dict[str, Any]:
        # Through JSON, so that tuples are lists and the digest is over what a reader will parse.
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, value: Any, *, origin: str = MANIFEST_NAME) -> Manifest:
        """Read a manifest and check it against its own digest.

        Args:
            value: parsed JSON.
            origin: the file it came from, for the message.

        Raises:
            UsageError: not a manifest of this version, or its content does not match its digest.
        """
        version = value.get("schema_version") if isinstance(value, dict) else None
        if type(version) is int and MANIFEST_VERSION < version <= LARGEST_SIZE:
            raise UsageError(
                f"{origin}: schema_version {version} is newer than this program reads ({MANIFEST_VERSION}); update clada-export"
            )
        validate_json(value, MANIFEST_SCHEMA, origin)
        content = {key: item for key, item in value.items() if key != "digest"}
        found = _digest(content)
        if found != value["digest"]:
            raise UsageError(
                f"{origin}: the file was edited or damaged: its content has digest {found[:16]}..., and it says "
                f"{value['digest'][:16]}...; export again instead of editing it"
            )
        SparsityPlan.from_dict(content["plan"], origin=f"{origin}: plan")
        _check_names(content, origin)
        return cls(
            **{
                **content,
                "load_signal": LoadSignal.from_dict(content["load_signal"], f"{origin}: load_signal"),
                "inputs": tuple(TensorSpec(**{**item, "shape": tuple(item["shape"])}) for item in content["inputs"]),
                "outputs": tuple(TensorSpec(**{**item, "shape": tuple(item["shape"])}) for item in content["outputs"]),
                "cache": tuple(CacheTensor(**{**item, "shape": tuple(item["shape"])}) for item in content["cache"]),
                "warnings": tuple(content["warnings"]),
            }
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `clada.json` into a folder.

    Raises:
        UsageError: the manifest does not follow `MANIFEST_SCHEMA`.
    """
    # The digest can be taken only of what is valid, so a stand-in is checked with the rest.
    validate_json({**manifest._content(), "digest": "0" * 64}, MANIFEST_SCHEMA, MANIFEST_NAME)
    value = manifest.to_dict()
    _check_names(value, MANIFEST_NAME)
    (folder / MANIFEST_NAME).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path | str, *, check_files: bool = True) -> Manifest:
    """Read and check the manifest of an export folder.

    Args:
        folder: what `clada-export` wrote.
        check_files: compare the sha256 of every listed file (`clada_export.files.check` says when large ones are read again).
            False compares only that it exists and its size.

    Raises:
        UsageError: no manifest, one that was edited, or a file that is missing, edited, or outside the folder, or a library
            that the manifest does not list.
        BackendError: the custom-op library is missing.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    try:
        found = folder.is_dir()
    except OSError as error:  # a name that is too long, a folder above that is closed
        raise UsageError(f"{folder}: can't be read: {error.strerror or error}") from error
    if not found:
        raise UsageError(f"{folder}: no such folder; give the folder that clada-export wrote")
    if not os.path.lexists(path):
        raise UsageError(f"{folder}: no {MANIFEST_NAME} in the folder; give the folder that clada-export wrote")
    manifest = Manifest.from_dict(read_json(path), origin=str(path))
    listed = manifest.listed(folder)
    if check_files:
        listed.check_hashes(manifest.digest)
    else:
        listed.check_sizes()
    listed.check_libraries()
    return manifest


def file_record(path: Path) -> dict[str, Any]:
    """The entry of a file in `files`: hexadecimal sha256, and its size in bytes."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"sha256": digest, "bytes": os.fstat(stream.fileno()).st_size}


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _check_names(content: dict[str, Any], origin: str) -> None:
    for name in content["files"]:
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST_NAME:
            raise UsageError(f"{origin}: files: {name!r} is not a plain relative path inside the folder")
    named = {key: content[key] for key in ("model", "library") if content[key] is not None}
    if content["plan"].get("tensors") is not None:
        named["plan: tensors"] = content["plan"]["tensors"]["file"]
    if content["engine"] is not None:
        named |= {f"engine: files: {index}": file["file"] for index, file in enumerate(content["engine"]["files"])}
        named["engine: layers"] = content["engine"]["layers"]
        if content["engine"]["plugin"] is not None:
            named["engine: plugin"] = content["engine"]["plugin"]["file"]
    for key, name in named.items():
        if name not in content["files"]:
            raise UsageError(f"{origin}: {key}: {name!r} is not one of the listed files")
