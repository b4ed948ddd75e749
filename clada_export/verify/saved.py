"""What a machine without a GPU leaves for one that has it: inputs of the engine, the eager model's outputs, and bounds.

Three runs of one short text, as Polygraphy reads them (`polygraphy run --load-inputs ... --load-outputs ...`): the prompt in
one pass, one decoded token at load = +inf, and the same token at a finite load.

    verify/inputs.json    a list of feeds, by input name
    verify/outputs.json   a RunResults with the outputs of eager PyTorch, float32
    verify/cases.json     for each run: name, profile, and the bounds that the engine is held to
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clada_export.artifact.manifest import CacheTensor, Manifest
from clada_export.artifact.profiles import choose_profile
from clada_export.decoder.decoder import Decoder
from clada_export.errors import BackendError, UsageError
from clada_export.files.json_files import read_json
from clada_export.plan.plan import SparsityPlan
from clada_export.runtime.cuda import to_float32
from clada_export.runtime.graph import ENTROPY, LOG_SUM_EXP
from clada_export.verify.eager import ReferenceModel
from clada_export.verify.load_outputs import load_output_bound, load_output_error
from clada_export.verify.numbers import compare_logits
from clada_export.verify.parity import FLIP_KL_FLOOR, FLIP_KL_SHARE, FLIP_SHARE, tolerance
from clada_export.verify.precision import EXACT, RoundedModel, Rounding, measure_rounding
from clada_export.verify.report import Check

FOLDER = "verify"
INPUTS, OUTPUTS, CASES = (f"{FOLDER}/{name}.json" for name in ("inputs", "outputs", "cases"))
PROMPT = 16
SPARSE_LOAD = 0.0
RUNNER = "eager PyTorch"

Infer = Callable[[int, dict[str, Any]], dict[str, Any]]
"""Runs the engine: (profile, feeds by name) to outputs by name, as arrays or tensors on the CPU."""


@dataclass(frozen=True)
class SavedCase:
    """One run. `bounds` has `max_abs` of the logits and, for a sparse run, `kl` and `flipped_share` in its place; and
    `load_outputs`, nats, if the engine returns them."""

    name: str
    profile: int
    bounds: dict[str, float]


def save_cases(
    folder: Path,
    manifest: Manifest,
    decoder: Decoder,
    plan: SparsityPlan,
    tokens: Sequence[int],
    profiles: Sequence[Any],
) -> None:
    """Run the eager decoder on a short text and write what the engine will be held to.

    Args:
        decoder: float32, its weights rounded to the engine's type.
        tokens: the text; its first `PROMPT` tokens are the prompt, and one more is decoded.

    Raises:
        BackendError: Polygraphy is missing.
    """
    prompt = max(1, min(PROMPT, len(tokens) - 1, max(profile.sequence[2] for profile in profiles)))
    row = [int(token) for token in tokens[: prompt + 1]]
    dense = decoder.dense_logits(row)
    reference = ReferenceModel(decoder, plan)
    loads = np.array([SPARSE_LOAD], np.float32)
    every_load = np.concatenate([np.full(prompt, np.inf, np.float32), loads])
    sparse = reference.run(row, every_load)
    neurons = sum(layer.width for layer in plan.layers)
    rounding = EXACT
    if manifest.dtype != "float32":
        rounded = RoundedModel(decoder, plan, manifest.dtype).run_all([row], [every_load], len(row), lambda logits: logits)
        rounding = measure_rounding(rounded, [sparse], [dense], 1, neurons)
    past = _eager_cache(decoder, row[:prompt], manifest.cache, reference)
    empty = {tensor.past: torch.zeros(_empty(tensor), dtype=getattr(torch, tensor.dtype)) for tensor in manifest.cache}
    feeds = [
        _feeds(manifest, row[:prompt], 0, np.inf, empty),
        _feeds(manifest, row[prompt:], prompt, np.inf, past),
        _feeds(manifest, row[prompt:], prompt, SPARSE_LOAD, past),
    ]
    every = np.array([[[layer.width] for layer in plan.layers]], np.int32)
    outputs = [
        {"logits": dense[None, :prompt], "active_neurons": every.repeat(prompt, axis=2)},
        {"logits": dense[None, prompt:], "active_neurons": every},
        {"logits": sparse.logits[None, prompt:], "active_neurons": sparse.active[None, :, prompt:]},
    ]
    cost = compare_logits(sparse.logits[prompt:], dense[prompt:]).kl
    largest = float(np.abs(dense).max())
    bound = max(tolerance(largest), rounding.logits)
    listed = {spec.name for spec in manifest.outputs}
    both = {"load_outputs": load_output_bound(largest, manifest.dtype)} if listed >= {LOG_SUM_EXP, ENTROPY} else {}
    sparse_bounds = {**_sparse_bounds(cost, rounding, neurons), **both}
    cases = [
        SavedCase("prompt, dense", choose_profile(profiles, 1, prompt, 0), {"max_abs": bound, **both}),
        SavedCase("decode, dense", choose_profile(profiles, 1, 1, prompt), {"max_abs": bound, **both}),
        SavedCase("decode, sparse", choose_profile(profiles, 1, 1, prompt), sparse_bounds),
    ]
    _write(folder, feeds, outputs, cases)


def _sparse_bounds(cost: float, rounding: Rounding, neurons: int) -> dict[str, float]:
    """One token has few decisions: a neuron within rounding of its threshold, and those that it draws, are a larger share."""
    return {
        "kl": max(FLIP_KL_SHARE * cost, FLIP_KL_FLOOR, rounding.sparse_kl),
        "flipped_share": max(FLIP_SHARE, rounding.flipped_share, 4.0 / max(neurons, 1)),
    }


def check_saved(folder: Path, infer: Infer) -> list[Check]:
    """Run the saved inputs and hold the outputs to the saved ones.

    Raises:
        UsageError: the export has no saved cases, or files that can't be read.
        BackendError: Polygraphy is missing.
    """
    load_json, results = _polygraphy()
    if not (folder / CASES).is_file():
        raise UsageError(f"{folder}: no {CASES}: the export was made with --no-verify; verify it with --source")
    cases = [SavedCase(**value) for value in read_json(folder / CASES)]
    try:
        feeds = load_json(str(folder / INPUTS))
        wanted = results.load(str(folder / OUTPUTS))[RUNNER]
    except Exception as error:  # Polygraphy's exceptions, and those of what it reads
        raise UsageError(f"{folder / FOLDER}: the saved inputs and outputs can't be read: {error}") from error
    return [
        _check(case, infer(case.profile, dict(feed)), dict(expected))
        for case, feed, expected in zip(cases, feeds, wanted, strict=True)
    ]


def _check(case: SavedCase, found: dict[str, Any], wanted: dict[str, Any]) -> Check:
    numbers = compare_logits(_float32(found["logits"])[0], _float32(wanted["logits"])[0])
    values = {**numbers.to_dict(), "flipped_share": _flipped(found, wanted)}
    if "load_outputs" in case.bounds:
        values["load_outputs"] = _load_outputs(found)
    faults = [
        f"{name} is {values[name]:.3g}; allowed {bound:.3g}" for name, bound in case.bounds.items() if not values[name] <= bound
    ]
    return Check(case.name, not faults, values, case.bounds, "; ".join(faults))


def _load_outputs(found: dict[str, Any]) -> float:
    if not {LOG_SUM_EXP, ENTROPY} <= found.keys():
        return float("inf")
    return load_output_error(_float32(found["logits"])[:, -1], _float32(found[LOG_SUM_EXP]), _float32(found[ENTROPY]))


def _flipped(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    counts = np.asarray(wanted["active_neurons"])
    dense = max(int(counts.sum()), 1)
    if "active_neurons" not in found:
        return float("inf")
    return float(np.abs(np.asarray(found["active_neurons"]) - counts).sum() / dense)


def _feeds(manifest: Manifest, tokens: Sequence[int], past: int, load: float, cache: dict[str, torch.Tensor]) -> dict[str, Any]:
    total = past + len(tokens)
    known: dict[str, Any] = {
        "input_ids": np.array([tokens], np.int64),
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(past, total, dtype=np.int64)[None],
        "load": np.full((1, len(tokens)), load, np.float32),
        # NumPy has no bfloat16: those stay tensors of torch, which Polygraphy takes too.
        **{name: value if value.dtype == torch.bfloat16 else value.numpy() for name, value in cache.items()},
    }
    return {spec.name: known[spec.name] for spec in manifest.inputs}


def _empty(tensor: CacheTensor) -> tuple[int, ...]:
    return (1, *(0 if isinstance(axis, str) else axis for axis in tensor.shape[1:]))


def _eager_cache(
    decoder: Decoder, tokens: Sequence[int], tensors: Sequence[CacheTensor], reference: ReferenceModel
) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        cache = decoder.run(torch.tensor([list(tokens)]), keep_cache=True).cache
    found = {"key": [layer.keys for layer in cache.layers], "value": [layer.values for layer in cache.layers]}
    if any(tensor.role == "stat" for tensor in tensors):
        stats = reference.run(tokens, np.full(len(tokens), np.inf, np.float32)).stats
        found["stat"] = [torch.from_numpy(stat) for stat in stats]
    return {tensor.past: found[tensor.role][tensor.layer].to(getattr(torch, tensor.dtype)).contiguous() for tensor in tensors}


def _float32(value: Any) -> npt.NDArray[np.float32]:
    if isinstance(value, torch.Tensor):
        return value.float().numpy()
    return to_float32(np.asarray(value), "float32")


def _write(folder: Path, feeds: list[dict[str, Any]], outputs: list[dict[str, Any]], cases: list[SavedCase]) -> None:
    _polygraphy()
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.json import save_json

    (folder / FOLDER).mkdir(exist_ok=True)
    save_json(feeds, str(folder / INPUTS))
    results = RunResults()
    results[RUNNER] = [IterationResult(outputs=values, runner_name=RUNNER) for values in outputs]
    results.save(str(folder / OUTPUTS))
    (folder / CASES).write_text(json.dumps([asdict(case) for case in cases], indent=2) + "\n", encoding="utf-8")


def _polygraphy() -> tuple[Callable[[str], Any], Any]:
    # Polygraphy logs what it does to stdout, which carries results here.
    os.environ.setdefault("POLYGRAPHY_AUTOINSTALL_DEPS", "0")
    try:
        from polygraphy.comparator import RunResults
        from polygraphy.json import load_json
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise BackendError("verifying a TensorRT export needs Polygraphy: pip install polygraphy") from error
    G_LOGGER.module_severity = G_LOGGER.ERROR
    return load_json, RunResults
