"""Real plans of several policies on a tiny model, and what makes them go wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import load, save

from clada_export.calibration import CalibrationOptions, calibrate, load_calibration_data
from clada_export.decoder.digest import weights_digest
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.load.controllers import CONTROLLERS
from clada_export.methods import PolicySettings, get_policy
from clada_export.methods.static import WeightPruning
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.tensors import PLAN_TENSORS, arrays_digest, named_arrays
from graph_passes.op import ACTIVATIONS, COMBINES, RULES, SCORES, STAT_NORMS
from graph_passes.router import DENSE_ROWS, HIDDEN_ACTIVATIONS, OUTPUTS
from tests.fuzz.harness import JSON_VALUES, mutated
from tests.tiny_models import tiny_model

CONTEXT = 32
_ROUTED = PolicySettings(rows=64)
_WAYS: dict[str, tuple[str, PolicySettings, str | None]] = {
    "clada": ("clada", PolicySettings(), None),
    "griffin": ("griffin", PolicySettings(), None),
    "tt": ("tt", PolicySettings(), None),
    "pruned": ("clada", PolicySettings(score="gate"), "wanda=neurons:0.25"),
    "d2dmoe": ("d2dmoe", _ROUTED, None),
    "lte": ("lte", PolicySettings(rows=64, finetune=True, rank=2), None),
    "lory": ("lory", _ROUTED, None),
}
PAYLOADS = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "' onload=alert(1) x='",
    "</style><script>1</script>",
    "</title></head><body onload=x>",
    "<svg/onload=alert(1)>",
    "javascript:alert(1)",
    "[x](javascript:alert(1))",
    "`</code><b>x",
    "{} {0} {name!r} {:>9999999999}",
    "\n---\nlicense: mit\n",
    "# head\n<b>x</b>",
    "\x1b[2J\x00\u202e",
    "&lt;script&gt;",
)


@dataclass(frozen=True)
class Given:
    """A plan as two files: the JSON value, and the bytes of its arrays (none without)."""

    value: Any
    arrays: bytes

    def write(self, folder: Path) -> Path:
        """Both files, as a user would give them; returns the JSON."""
        (folder / PLAN_TENSORS).write_bytes(self.arrays)
        path = folder / "plan.json"
        path.write_text(json.dumps(self.value), encoding="utf-8")
        return path


def real_plans(kind: str = "llama") -> dict[str, Given]:
    """Calibrated plans by name: with a statistic, pruned neurons, routers, adapters and merged experts."""
    found = {}
    for name, (policy, settings, prune) in _WAYS.items():
        model = tiny_model(kind)
        source = {"name": "tiny", "weights_digest": weights_digest(model), "dtype": "float32"}
        data = load_calibration_data(None, 256, context=CONTEXT)
        options = CalibrationOptions(sparsity=0.5, prune=WeightPruning.parse(prune) if prune else None)
        result = calibrate(TorchDecoder(model), get_policy(policy, settings), data, source, options)
        found[name] = Given(*_files(result.plan))
    return found


def _files(plan: SparsityPlan) -> tuple[Any, bytes]:
    return json.loads(json.dumps(plan.to_dict(), allow_nan=False)), save(named_arrays(plan.arrays)) if plan.arrays else b""


def planted(value: Any, payload: str) -> Any:
    """The value with the payload in every text that may be any text."""
    value = json.loads(json.dumps(value))
    value["policy"] = payload
    for layer in value["layers"]:
        layer["name"] = layer["name"] + payload
    value["source"] |= {"name": payload, payload: payload}
    value["calibration"] = planted_calibration(payload)
    return value


def planted_calibration(payload: str) -> dict[str, Any]:
    """Everything that the report shows of a calibration, in the payload's words."""
    step = {"sparsity": 0.1, "cost": 0.1, "kl": 0.1, "ppl_increase": 0.1}
    return {
        "text": payload,
        "budget": payload,
        "allocation": payload,
        "variant": payload,
        payload: payload,
        "drift": {payload: 1.0, "kl": None},
        "search": [step | {payload: payload}],
        "compared": [{"variant": payload, "allocation": payload, "sparsity": 0.1, "kl": 1e300}],
        "load_response": [{"signal": payload, "slope": 0.1, "better": True}, {payload: payload}],
        "auto": {
            **dict.fromkeys(("goal", "rule", "chosen", "text"), payload),
            "candidates": [{"policy": payload, "why": payload, "variant": payload, "chosen": True, "kl": -1e300}],
            "clock": {"left_out": payload, "text": payload},
        },
    }


_SMALL = st.sampled_from((0, 1, 2, 3, 4, 8, 16, 32, 48, 64, 72, 95, 96, 97, 192, 0.5, 1.5, 1e-30, 1e30, 3e38, None, True))
_BELOW = st.integers(0, 2**32 - 1)
_OF_THE_OP = (*SCORES, *RULES, *COMBINES, *STAT_NORMS, *ACTIVATIONS, *OUTPUTS, *HIDDEN_ACTIVATIONS, *DENSE_ROWS, *CONTROLLERS)
_WORDS = st.sampled_from(
    (*_OF_THE_OP, "wanda=0.5", "kl=0.1", "ppl=1%", "ppl=1%,kl=0.1", "imported", "model.layers.1.mlp.down_proj")
)


@st.composite
def plausible(draw: st.DrawFn, value: Any) -> Any:
    """A plan with one to three numbers or words changed to others that some plan has: it follows the schema more often."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_leaves({key: item for key, item in value.items() if key not in ("source", "tensors", "version")}))
        parent, key = places[draw(_BELOW) % len(places)]
        item = parent[key]
        parent[key] = draw(_WORDS) if isinstance(item, str) else draw(_SMALL)
        if isinstance(item, float) and isinstance(parent[key], int):
            parent[key] = float(parent[key])
    if draw(st.booleans()):
        layer = draw(st.sampled_from(value["layers"]))
        count = draw(st.sampled_from((1, 2, 3, 4, 6, 48, 72, 95, 96, 97)))
        layer["threshold"] = [draw(st.sampled_from((0.0, 0.1, 1.0, 1e30)))] * count
    return value


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, dict | list):
            yield from _leaves(item)
        else:
            yield value, key


_TYPES = st.sampled_from((np.float16, np.float64, np.int32, np.int64, np.uint8, np.bool_))
_ARRAY_CHANGES = st.sampled_from(
    ("drop", "rename", "type", "shape", "flat", "nan", "huge", "negative", "empty", "twice", "swap")
)


@st.composite
def rearranged(draw: st.DrawFn, given: Given) -> Given:
    """Other arrays under a digest that fits them."""
    arrays = dict(load(given.arrays))
    names = sorted(arrays)
    name, other = names[draw(_BELOW) % len(names)], names[draw(_BELOW) % len(names)]
    array = arrays[name].copy()
    match draw(_ARRAY_CHANGES):
        case "drop":
            del arrays[name]
        case "rename":
            arrays[draw(st.text(max_size=6)) + name] = arrays.pop(name)
        case "type":
            arrays[name] = array.astype(draw(_TYPES))
        case "shape":
            arrays[name] = np.ascontiguousarray(array.T if array.ndim > 1 else array[:-1])
        case "flat":
            arrays[name] = array.reshape(-1)[:1].reshape(())
        case "nan":
            arrays[name] = array if array.dtype != np.float32 else np.full_like(array, np.nan)
        case "huge":
            arrays[name] = np.full_like(array, 3e38 if array.dtype == np.float32 else 2**62)
        case "negative":
            arrays[name] = -array
        case "empty":
            arrays[name] = array[:0]
        case "twice":
            arrays[name] = np.ascontiguousarray(np.concatenate((array, array)))
        case _:
            arrays[name], arrays[other] = arrays[other], array
    return fitted(given.value, arrays)


def fitted(value: Any, arrays: dict[str, np.ndarray]) -> Given:
    """A plan with these arrays, whose digest it says."""
    value = json.loads(json.dumps(value))
    value["tensors"] = {"file": PLAN_TENSORS, "sha256": arrays_digest(arrays)}
    return Given(value, save(arrays))


@st.composite
def wrong_plans(draw: st.DrawFn, plans: dict[str, Given]) -> Given:
    """Any of the plans with its JSON or its arrays changed; some are still plans."""
    given = draw(st.sampled_from(list(plans.values())))
    kinds: list[Callable[[], Given]] = [
        lambda: Given(draw(mutated(given.value)), given.arrays),
        lambda: Given(draw(plausible(given.value)), given.arrays),
        lambda: Given(draw(plausible(given.value)), given.arrays),
        lambda: Given(draw(plausible(planted(given.value, draw(st.sampled_from(PAYLOADS))))), given.arrays),
        lambda: Given(_with_calibration(given.value, draw(JSON_VALUES), draw), given.arrays),
    ]
    if given.arrays:
        kinds += [lambda: draw(rearranged(given)), lambda: draw(rearranged(given))]
    return kinds[draw(_BELOW) % len(kinds)]()


def _with_calibration(value: Any, item: Any, draw: st.DrawFn) -> Any:
    value = json.loads(json.dumps(value))
    keys = ("auto", "search", "compared", "load_response", "drift", "context", "budget", "pruning", "relative_bytes", "text")
    value["calibration"][draw(st.sampled_from(keys))] = item
    return value
