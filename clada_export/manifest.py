"""`Manifest`: what an export folder is, as JSON (`clada.json`). The format is documented in `docs/manifest.md`.

It holds no times and no machine paths, so that two exports with the same pins are the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from clada_export.errors import BackendError, UsageError
from clada_export.plan import PLAN_SCHEMA, LoadSignal, SparsityPlan, read_json, validate_json

MANIFEST_NAME = "clada.json"
MANIFEST_VERSION = 1

PADDINGS = ("left", "none")
"""Rows of a batch may be padded on the left, or have to be of one length."""
TARGETS = ("ort", "trt")
CACHE_DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32")
CACHE_ROLES = ("key", "value", "stat", "merged_in", "merged_out")
LIBRARY_SUFFIXES = (".so", ".dll", ".dylib")

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*")

_STRING = {"type": "string", "minLength": 1}
_SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_FILES = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "required": ["sha256", "bytes"],
        "additionalProperties": False,
        "properties": {"sha256": _SHA256, "bytes": {"type": "integer", "minimum": 0}},
    },
}
_SHAPE = {"type": "array", "items": {"anyOf": [{"type": "integer", "minimum": 0}, _STRING]}}
_TENSORS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name", "dtype", "shape"],
        "additionalProperties": False,
        "properties": {"name": _STRING, "dtype": _STRING, "shape": _SHAPE},
    },
}

_RANGE = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 3, "maxItems": 3}
_PROFILE = {
    "type": "object",
    "required": ["name", "batch", "sequence", "past"],
    "additionalProperties": False,
    "properties": {"name": _STRING, "batch": _RANGE, "sequence": _RANGE, "past": _RANGE},
}
_ENGINE_FILE = {
    "type": "object",
    "required": ["file", "compute_capabilities"],
    "additionalProperties": False,
    "properties": {"file": _STRING, "compute_capabilities": {"type": "array", "items": _STRING, "minItems": 1}},
}
_PLUGIN = {
    "type": "object",
    "required": ["name", "version", "namespace", "file", "embedded", "layers"],
    "additionalProperties": False,
    "properties": {
        "name": _STRING,
        "version": _STRING,
        "namespace": _STRING,
        "file": _STRING,
        "embedded": {"type": "boolean"},
        "layers": {"type": "integer", "minimum": 1},
    },
}
_ENGINE = {
    "type": "object",
    "required": [
        "backend",
        "version",
        "package",
        "files",
        "profiles",
        "plugin",
        "refit",
        "weight_streaming",
        "layers",
        "commands",
    ],
    "additionalProperties": False,
    "properties": {
        "backend": {"enum": ["tensorrt", "tensorrt_rtx"]},
        "version": _STRING,
        "package": _STRING,
        "files": {"type": "array", "items": _ENGINE_FILE, "minItems": 1},
        "profiles": {"type": "array", "items": _PROFILE, "minItems": 1},
        "plugin": {"anyOf": [{"type": "null"}, _PLUGIN]},
        "refit": {"type": "boolean"},
        "weight_streaming": {"type": "boolean"},
        "layers": _STRING,
        "commands": {"type": "object", "additionalProperties": _STRING},
    },
}

MANIFEST_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "clada-export manifest",
    "type": "object",
    "required": [
        "schema_version",
        "tool_version",
        "source",
        "target",
        "op",
        "plan",
        "load_signal",
        "model",
        "inputs",
        "outputs",
        "dtype",
        "cache",
        "versions",
        "library",
        "engine",
        "verification",
        "drift",
        "warnings",
        "tokenizer",
        "files",
        "digest",
    ],
    "additionalProperties": False,
    "properties": {
        "schema_version": {"const": MANIFEST_VERSION},
        "tool_version": _STRING,
        "source": {
            "type": "object",
            "required": ["name", "kind", "revision", "weights_digest", "files"],
            "additionalProperties": False,
            "properties": {
                "name": _STRING,
                "kind": {"enum": ["hub", "folder", "gguf", "onnx"]},
                "revision": {"type": ["string", "null"]},
                "weights_digest": _STRING,
                "files": _FILES,
                "license": {"type": ["string", "null"]},
                "dtype": {"type": ["string", "null"]},
            },
        },
        "target": {"enum": list(TARGETS)},
        "op": {
            "type": "object",
            "required": ["domain", "name", "version"],
            "additionalProperties": False,
            "properties": {"domain": _STRING, "name": _STRING, "version": {"type": "integer", "minimum": 1}},
        },
        "plan": {key: value for key, value in PLAN_SCHEMA.items() if key != "$schema"},
        "load_signal": PLAN_SCHEMA["properties"]["load"],
        "model": _STRING,
        "inputs": _TENSORS,
        "outputs": _TENSORS,
        "dtype": _STRING,
        "cache": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["layer", "role", "past", "present", "dtype", "shape"],
                "additionalProperties": False,
                "properties": {
                    "layer": {"type": "integer", "minimum": 0},
                    "role": {"enum": list(CACHE_ROLES)},
                    "past": _STRING,
                    "present": _STRING,
                    "dtype": {"enum": list(CACHE_DTYPES)},
                    "shape": _SHAPE,
                },
            },
        },
        "versions": {"type": "object", "additionalProperties": {"type": "string"}},
        "library": {"type": ["string", "null"]},
        "engine": {"anyOf": [{"type": "null"}, _ENGINE]},
        "verification": {"type": "object"},
        "drift": {"type": "object"},
        "warnings": {"type": "array", "items": {"type": "string"}},
        "tokenizer": {"type": "boolean"},
        "padding": {"enum": list(PADDINGS)},
        "first_position": {"type": "integer", "minimum": 0},
        "ffn_runs": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 2}},
        "files": _FILES,
        "digest": _SHA256,
    },
}


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
    [batch_size, heads, past_sequence_length, head_dim].
    """

    layer: int
    role: str
    past: str
    present: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about an export. `files` is filled in by `ArtifactWriter.commit`.

    `padding` is one of `PADDINGS`. `first_position` is what the graph adds to `position_ids`: the model has as many positions
    less. `ffn_runs` says how often a token runs each FFN that it runs more than once. `engine` is what a TensorRT export has
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
        if isinstance(value, dict) and isinstance(version := value.get("schema_version"), int) and version > MANIFEST_VERSION:
            raise UsageError(
                f"{origin}: schema_version {version} is newer than this program reads ({MANIFEST_VERSION}); update clada-export"
            )
        try:
            validate_json(value, MANIFEST_SCHEMA, origin)
            content = {key: item for key, item in value.items() if key != "digest"}
            found = _digest(content)
        except RecursionError as error:
            raise UsageError(f"{origin}: nested too deeply to be a manifest") from error
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
        check_files: compare the sha256 of every listed file. False compares only that it exists and its size.

    Raises:
        UsageError: no manifest, one that was edited, or a file that is missing, edited, or outside the folder, or a library
            that the manifest does not list.
        BackendError: the custom-op library is missing.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the folder that clada-export wrote")
    if not path.is_file():
        raise UsageError(f"{folder}: no {MANIFEST_NAME} in the folder; give the folder that clada-export wrote")
    manifest = Manifest.from_dict(read_json(path), origin=str(path))
    try:
        for name, record in manifest.files.items():
            _check_file(folder, name, record, check_files, manifest.library)
        _check_libraries(folder, manifest)
    except OSError as error:
        raise UsageError(f"{error.filename or folder}: can't be read: {error.strerror or error}") from error
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
    if content["engine"] is not None:
        named |= {f"engine: files: {index}": file["file"] for index, file in enumerate(content["engine"]["files"])}
        named["engine: layers"] = content["engine"]["layers"]
        if content["engine"]["plugin"] is not None:
            named["engine: plugin"] = content["engine"]["plugin"]["file"]
    for key, name in named.items():
        if name not in content["files"]:
            raise UsageError(f"{origin}: {key}: {name!r} is not one of the listed files")


def _check_file(folder: Path, name: str, record: dict[str, Any], hashed: bool, library: str | None) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"{path}: a link that leads out of the folder; copy the folder with its links resolved (cp -rL) and use the copy"
        )
    try:
        found = path.stat()
    except FileNotFoundError:
        if name == library:
            raise BackendError(f"{path}: the custom-op library is missing; copy the whole folder or export again") from None
        raise UsageError(
            f"{path}: the manifest lists this file, and it is missing; copy the whole folder or export again"
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"{path}: not a regular file")
    if found.st_size != record["bytes"]:
        raise UsageError(f"{path}: has {found.st_size} bytes, and the manifest says {record['bytes']}; copy it or export again")
    if hashed and (digest := file_record(path)["sha256"]) != record["sha256"]:
        raise UsageError(
            f"{path}: changed after the export: its sha256 is {digest[:16]}..., and the manifest has {record['sha256'][:16]}"
        )


def _check_libraries(folder: Path, manifest: Manifest) -> None:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name not in manifest.files and (path.suffix in LIBRARY_SUFFIXES or ".so." in path.name):
            raise UsageError(f"{path}: a library that the manifest does not list; remove it if you did not put it there")
