"""`PLAN_SCHEMA`: what the JSON of a sparsity plan may hold. The format is documented in `docs/plan.md`."""

from __future__ import annotations

from typing import Any

from clada_export.load.controllers import CONTROLLERS
from graph_passes.op import ACTIVATIONS, COMBINES, RULES, SCORES, STAT_NORMS
from graph_passes.router import DENSE_ROWS, HIDDEN_ACTIVATIONS, OUTPUTS

PLAN_VERSION = 1

LARGEST_SIZE = 2**31 - 1
"""Of anything counted: the op's sizes are 32-bit."""
LARGEST_FLOAT = 3.4028234663852886e38
SMALLEST_FLOAT = 1.1754943508222875e-38
"""The float32 numbers that are finite, and the least that is above 0 at full precision: the engine has no others."""
MOST_LAYERS = 10_000
LONGEST_CONTEXT = 2**20
SHORTEST_CONTEXT = 8
"""Tokens of a calibration window."""

_STRING = {"type": "string"}
_STRING_OR_NULL = {"type": ["string", "null"]}
_NUMBER = {"type": "number", "minimum": -LARGEST_FLOAT, "maximum": LARGEST_FLOAT}
_NON_NEGATIVE = {"type": "number", "minimum": 0, "maximum": LARGEST_FLOAT}
_POSITIVE = {"type": "number", "minimum": SMALLEST_FLOAT, "maximum": LARGEST_FLOAT}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_SIZE = {"type": "integer", "minimum": 1, "maximum": LARGEST_SIZE}
_SIZE_OR_NULL = {"type": ["integer", "null"], "minimum": 1, "maximum": LARGEST_SIZE}
_COUNT = {"type": "integer", "minimum": 0}
_ANY_NUMBER = {"type": "number"}
_ANY_NUMBER_OR_NULL = {"type": ["number", "null"]}

_LAYER = {
    "type": "object",
    "required": ["name", "activation", "gated", "hidden_size", "intermediate_size", "threshold"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "activation": {"enum": list(ACTIVATIONS)},
        "gated": {"type": "boolean"},
        "hidden_size": _SIZE,
        "intermediate_size": _SIZE,
        "threshold": {"type": "array", "minItems": 1, "items": _NON_NEGATIVE},
        "load_slope": _NUMBER,
        "load_min": _POSITIVE,
        "load_max": _POSITIVE,
        "granule": _SIZE,
        "combine": {"enum": list(COMBINES)},
        "backbone_min": _NON_NEGATIVE,
        "prior_gamma": _NON_NEGATIVE,
        "stat_norm": {"enum": list(STAT_NORMS)},
        "kept_neurons": _SIZE_OR_NULL,
        "reordered": {"type": "boolean"},
        "router": {
            "type": ["object", "null"],
            "required": ["layers", "hidden", "output", "normalise", "scale"],
            "additionalProperties": False,
            "properties": {
                "layers": _SIZE,
                "hidden": {"enum": list(HIDDEN_ACTIVATIONS)},
                "output": {"enum": list(OUTPUTS)},
                "normalise": {"type": "boolean"},
                "scale": _POSITIVE,
                "k": _SIZE_OR_NULL,
                "dense_rows": {"enum": list(DENSE_ROWS)},
            },
        },
        "merge": {"type": ["integer", "null"], "minimum": 2, "maximum": LARGEST_SIZE},
        "adapter_rank": _SIZE_OR_NULL,
        "expected_sparsity": _SHARE,
        "expected_cett": _NON_NEGATIVE,
    },
}

_LOAD = {
    "type": "object",
    "required": [
        "surprisal_mean",
        "surprisal_std",
        "entropy_mean",
        "entropy_std",
        "surprisal_weight",
        "entropy_weight",
    ],
    "additionalProperties": False,
    "properties": {
        "surprisal_mean": _NUMBER,
        "surprisal_std": _POSITIVE,
        "entropy_mean": _NUMBER,
        "entropy_std": _POSITIVE,
        "surprisal_weight": _NUMBER,
        "entropy_weight": _NUMBER,
        "rule": {"enum": list(CONTROLLERS)},
        "parameters": {"type": "object", "additionalProperties": _NUMBER},
        "momentum": _SHARE,
        "slope": _POSITIVE,
    },
}

_CANDIDATE = {
    "type": "object",
    "required": ["policy", "why"],
    "properties": {
        **dict.fromkeys(("policy", "why"), _STRING),
        **dict.fromkeys(("variant", "allocation"), _STRING_OR_NULL),
        **dict.fromkeys(("sparsity", "kl", "ppl_increase", "cost", "relative_bytes", "seconds"), _ANY_NUMBER_OR_NULL),
        "chosen": {"type": "boolean"},
    },
}

# What the program reads again or the report shows. The rest (how routers were trained, ...) is kept as it is.
_CALIBRATION = {
    "type": "object",
    "properties": {
        **dict.fromkeys(("text", "digest", "budget", "allocation", "variant"), _STRING),
        "context": {"type": "integer", "minimum": 1, "maximum": LONGEST_CONTEXT},
        **dict.fromkeys(("calibration_tokens", "heldout_tokens", "prompt_tokens"), _COUNT),
        "relative_bytes": _ANY_NUMBER,
        "pruning": {"type": "object", "properties": {"text_digest": _STRING}},
        "drift": {"type": "object", "additionalProperties": _ANY_NUMBER_OR_NULL},
        "compared": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["variant", "allocation", "sparsity", "kl"],
                "properties": {"variant": _STRING, "allocation": _STRING, "sparsity": _ANY_NUMBER, "kl": _ANY_NUMBER},
            },
        },
        "search": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["sparsity", "cost", "kl"],
                "properties": {
                    **dict.fromkeys(("sparsity", "cost", "kl"), _ANY_NUMBER),
                    "ppl_increase": _ANY_NUMBER_OR_NULL,
                },
            },
        },
        "load_response": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "signal": _STRING,
                    **dict.fromkeys(("slope", "kl", "kl_without", "gain", "standard_error", "sparsity"), _ANY_NUMBER),
                    "better": {"type": "boolean"},
                },
            },
        },
        "auto": {
            "type": "object",
            "properties": {
                **dict.fromkeys(("goal", "rule", "chosen", "text"), _STRING),
                "candidates": {"type": "array", "items": _CANDIDATE},
                "clock": {"type": "object", "properties": {"text": _STRING, "left_out": _STRING}},
            },
        },
    },
}

PLAN_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "clada-export sparsity plan",
    "type": "object",
    "required": ["version", "policy", "score", "rule", "layers", "load", "source"],
    "additionalProperties": False,
    "properties": {
        "version": {"type": "integer", "const": PLAN_VERSION},
        "policy": _STRING,
        "score": {"enum": list(SCORES)},
        "rule": {"enum": list(RULES)},
        "layers": {"type": "array", "maxItems": MOST_LAYERS, "items": _LAYER},
        "load": _LOAD,
        "source": {"type": "object", "required": ["weights_digest"], "properties": {"weights_digest": _STRING}},
        "calibration": _CALIBRATION,
        "prune": _STRING_OR_NULL,
        "tensors": {
            "type": ["object", "null"],
            "required": ["file", "sha256"],
            "additionalProperties": False,
            "properties": {
                "file": {"type": "string", "maxLength": 255, "pattern": "^[A-Za-z0-9._-]+$"},
                "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
            },
        },
    },
}
