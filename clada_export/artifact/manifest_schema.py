"""`MANIFEST_SCHEMA`: what `clada.json` may hold. The format is documented in `docs/manifest.md`."""

from __future__ import annotations

from typing import Any

from clada_export.decoder.padding_kinds import PADDINGS
from clada_export.plan.schema import LARGEST_SIZE, PLAN_SCHEMA
from clada_export.plan.targets import TARGET_TRAITS
from clada_export.plan.weights_form import FORMS, KINDS

MANIFEST_VERSION = 1

TARGETS = tuple(TARGET_TRAITS)
CACHE_DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32")
CACHE_ROLES = ("key", "value", "stat", "merged_in", "merged_out")

_STRING = {"type": "string", "minLength": 1}
_NUMBER = {"type": "number"}
_SIZE = {"type": "integer", "minimum": 0, "maximum": LARGEST_SIZE}
_COUNT = {"type": "integer", "minimum": 1, "maximum": LARGEST_SIZE}
_SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_FILES = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "required": ["sha256", "bytes"],
        "additionalProperties": False,
        "properties": {"sha256": _SHA256, "bytes": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}},
    },
}
_SHAPE = {"type": "array", "maxItems": 8, "items": {"anyOf": [_SIZE, _STRING]}}
_TENSORS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name", "dtype", "shape"],
        "additionalProperties": False,
        "properties": {"name": _STRING, "dtype": _STRING, "shape": _SHAPE},
    },
}

_RANGE = {"type": "array", "items": _SIZE, "minItems": 3, "maxItems": 3}
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
        "layers": _COUNT,
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

# Empty where it was not measured. The numbers that are shown have to be there; others may come with them.
_DRIFT = {
    "type": "object",
    "properties": {"tokens": _SIZE, "ppl_increase": _NUMBER, "kl": _NUMBER, "top1": _NUMBER},
    "if": {"minProperties": 1},
    "then": {"required": ["tokens", "ppl_increase", "kl", "top1"]},
}

_MATRICES = {
    "type": "object",
    "required": ["bits", "matrices", "bytes"],
    "additionalProperties": False,
    "properties": {"bits": _COUNT, "matrices": _COUNT, "bytes": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}},
}
# Empty where weights are numbers of the type `dtype`.
_WEIGHTS = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"form": {"enum": list(FORMS)}, **dict.fromkeys(KINDS, _MATRICES)},
    "if": {"minProperties": 1},
    "then": {"required": ["form"]},
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
        "schema_version": {"type": "integer", "const": MANIFEST_VERSION},
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
            "properties": {"domain": _STRING, "name": _STRING, "version": _COUNT},
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
                    "layer": _SIZE,
                    "role": {"enum": list(CACHE_ROLES)},
                    "past": _STRING,
                    "present": _STRING,
                    "dtype": {"enum": list(CACHE_DTYPES)},
                    "shape": _SHAPE,
                    "in_place": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 1, "maximum": 7}]},
                },
            },
        },
        "versions": {"type": "object", "additionalProperties": {"type": "string"}},
        "library": {"type": ["string", "null"]},
        "engine": {"anyOf": [{"type": "null"}, _ENGINE]},
        "verification": {"type": "object"},
        "drift": _DRIFT,
        "warnings": {"type": "array", "items": {"type": "string"}},
        "tokenizer": {"type": "boolean"},
        "padding": {"enum": list(PADDINGS)},
        "first_position": _SIZE,
        "weights": _WEIGHTS,
        "ffn_runs": {"type": "object", "additionalProperties": {**_COUNT, "minimum": 2}},
        "files": _FILES,
        "digest": _SHA256,
    },
}
