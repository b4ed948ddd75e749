"""Manifests that a stranger wrote or that are damaged: read, shown and used, with a digest that fits or not."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from clada_export.artifact.manifest import MANIFEST_NAME, _digest, file_record, read_manifest
from clada_export.artifact.profiles import choose_profile
from clada_export.cli import main
from clada_export.errors import CladaError, UsageError
from clada_export.load.signal import LoadSignal
from clada_export.load.tracker import LoadTracker
from clada_export.plan.layer import LayerPlan, RouterForm
from clada_export.plan.plan import SparsityPlan
from clada_export.runtime.limits import read_limits
from clada_export.runtime.tensorrt_session import engine_for, engine_profiles
from tests.clada_export.runtime.test_runtime import make_manifest
from tests.clada_export.runtime.test_tensorrt_runtime import RECORD
from tests.fuzz.harness import JSON_VALUES, damaged, fuzz, hold, mutated

LAYER = LayerPlan("model.layers.0.mlp.down_proj", "silu", True, 8, 16, (0.1,))
DRIFT = {"tokens": 9, "dense_ppl": 2.0, "ppl": 2.1, "ppl_increase": 0.05, "kl": 0.01, "top1": 0.9, "sparsity": None}
PLUGIN = {"name": "SparseFFN", "version": "1", "namespace": "com.clada", "file": "lib.so", "embedded": False, "layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("manifests") / "out"
    out.mkdir()
    for name in ("model.onnx", "lib.so", "plan.safetensors", "layers.json"):
        (out / name).write_bytes(name.encode())
    (out / "config.json").write_text(json.dumps({"max_position_embeddings": 24, "vocab_size": 11}))
    return out


@pytest.fixture(scope="module")
def manifests(folder: Path) -> list[dict[str, Any]]:
    """One of each kind: plain, with everything, and for TensorRT."""
    files = {path.name: file_record(path) for path in sorted(folder.iterdir())}
    plain = make_manifest().with_files(files)
    router = RouterForm(1, "identity", "softmax", False, 1.0)
    layers = (replace(LAYER, router=router, granule=4, reordered=True, expected_sparsity=0.4),)
    plan = SparsityPlan(
        "moefication",
        "external",
        "topk",
        tuple(replace(layer, threshold=(2.0,)) for layer in layers),
        LoadSignal(),
        {"weights_digest": "0"},
    )
    value = plan.to_dict()
    value["tensors"] = {"file": "plan.safetensors", "sha256": "0" * 64}
    value["calibration"] = {"relative_bytes": 0.5, "budget": "ppl=2%", "context": 512}
    signal = LoadSignal(rule="gate", parameters={"window": 12.0}, momentum=0.02)
    full = replace(
        plain,
        plan={**value, "prune": "wanda=2:4"},
        load_signal=signal,
        drift=DRIFT,
        verification={"checks": [{"name": "x", "passed": True}]},
        warnings=("careful",),
        library="lib.so",
        ffn_runs={LAYER.name: 2},
        first_position=2,
    )
    engine = {**RECORD, "plugin": PLUGIN, "layers": "layers.json", "commands": {"trtexec": "trtexec --x"}}
    rtx = replace(full, target="trt", engine=engine, library="lib.so", dtype="float16")
    return [manifest.to_dict() for manifest in (plain, full, rtx)]


def fitting(value: Any) -> Any:
    """With the digest that a careful editor would give it."""
    if isinstance(value, dict):
        try:
            value["digest"] = _digest({key: item for key, item in value.items() if key != "digest"})
        except (ValueError, UnicodeEncodeError):
            value["digest"] = "0" * 64
    return value


def use(folder: Path, value: Any) -> None:
    """Read a manifest, show it, and do with it what a runtime does before it opens the graph."""
    (folder / MANIFEST_NAME).write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
    manifest = read_manifest(folder)
    # What was left out has its default, and the digest is over that.
    compared = value.keys() - {"digest", "load_signal"}
    assert {key: manifest.to_dict()[key] for key in compared} == {key: value[key] for key in compared}
    for arguments in ([], ["--json"]):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            assert main(["inspect", str(folder), *arguments]) == 0, said.getvalue()
    manifest.sparsity_plan()
    read_limits(folder, manifest)
    if manifest.engine is not None:
        engine_for(manifest.engine, None)
        choose_profile(engine_profiles(manifest), 1, 1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker = LoadTracker(manifest.load_signal)
        for signals in ((1.0, 2.0), (0.0, 40.0), (3e38, 3e38), (-1e-30, 0.0)):
            load = tracker.step([signals[0]], [signals[1]])
            assert not np.isnan(load).any() and not np.isneginf(load).any()


def change(path: str, new: Any) -> Callable[[Any], Any]:
    """Set the value at a place like `plan/layers/0/name`."""

    def apply(value: Any) -> Any:
        *parents, last = path.split("/")
        inner = value
        for key in parents:
            inner = inner[int(key) if isinstance(inner, list) else key]
        inner[last] = new
        return value

    return apply


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


CASES: dict[str, tuple[int, Callable[[Any], Any], str]] = {
    "a deep list": (0, change("verification/x", nested(900)), "nested too deeply"),
    "a drift without its numbers": (0, change("drift", {"kl": 0.1}), "drift: 'tokens' is a required property"),
    "a drift that is text": (1, change("drift/ppl_increase", "0.1"), "drift/ppl_increase"),
    "a drift of null": (1, change("drift/kl", None), "drift/kl"),
    "a drift of a list": (1, change("drift/top1", [1]), "drift/top1"),
    "a drift beyond float64": (1, change("drift/kl", 10**400), "too large"),
    "an integer of 400 digits": (0, change("first_position", 10**400), "too large"),
    "a float for an integer": (0, change("first_position", 2.0), "first_position"),
    "a float for the version": (0, change("schema_version", 1.0), "schema_version"),
    "true for the version": (0, change("schema_version", True), "schema_version"),
    "a newer version": (0, change("schema_version", 2), "schema_version 2 is newer"),
    "a version of 300 digits": (0, change("schema_version", 10**300), "schema_version"),
    "a size beyond 32 bits": (0, change("cache/0/shape", ["batch", 2**31, "past", 6]), "cache/0/shape"),
    "too many axes": (0, change("cache/0/shape", ["batch"] * 99), "cache/0/shape"),
    "sizes of a profile": (2, change("engine/profiles/0/past", [0, 1, 2**40]), "engine/profiles/0/past"),
    "a slope next to 0": (0, change("load_signal/slope", 1e-39), "load_signal/slope"),
    "a deviation next to 0": (0, change("load_signal/surprisal_std", 1e-300), "load_signal/surprisal_std"),
    "a parameter beyond float32": (1, change("load_signal/parameters", {"window": 1e300}), "load_signal/parameters/window"),
    "a window beyond all bounds": (1, change("load_signal/parameters", {"window": 1e9}), "window is 1e"),
    "a momentum above 1": (1, change("load_signal/momentum", 1e300), "load_signal/momentum"),
    "half of a surrogate pair": (0, change("source/name", "\ud800"), "surrogate"),
    "a file of half a surrogate pair": (0, change("files", {"\udcff": {}}), "surrogate"),
    "arrays that are not listed": (1, change("plan/tensors/file", "other.safetensors"), "plan: tensors: 'other"),
    "a library that is not listed": (1, change("library", "other.so"), "library: 'other.so' is not one of the listed files"),
    "a plugin that is not listed": (2, change("engine/plugin/file", "x.so"), "engine: plugin: 'x.so'"),
    "a negative size": (0, change("files/model.onnx/bytes", -1), "files/model.onnx/bytes"),
    "a size beyond 64 bits": (0, change("files/model.onnx/bytes", 2**63), "files/model.onnx/bytes"),
    "runs that are text": (1, change("ffn_runs", {LAYER.name: "2"}), "ffn_runs"),
    "no object": (0, lambda value: [value], "clada.json: (top level)"),
    "nothing": (0, lambda value: None, "clada.json: (top level)"),
}


@pytest.mark.parametrize("name", CASES)
def test_corpus(folder: Path, manifests: list[dict[str, Any]], name: str) -> None:
    which, apply, said = CASES[name]
    value = fitting(apply(json.loads(json.dumps(manifests[which]))))
    error = hold(lambda: use(folder, value))
    assert isinstance(error, UsageError)
    assert said in str(error) and MANIFEST_NAME in str(error)


@pytest.mark.parametrize("which", range(3))
def test_the_manifests_are_good(folder: Path, manifests: list[dict[str, Any]], which: int) -> None:
    assert hold(lambda: use(folder, fitting(json.loads(json.dumps(manifests[which]))))) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"{",
        b"1" * 5000,
        b"[" * 100_000,
        b'{"a":' * 2000,
        b"NaN",
        b"Infinity",
        b"\x00" * 100,
        b'"\\ud800"',
        b"{}" + b" " * (33 << 20),
    ],
    ids=["empty", "latin", "open", "digits", "brackets", "braces", "nan", "infinity", "zeros", "surrogate", "long"],
)
def test_files_that_are_no_json(folder: Path, text: bytes) -> None:
    (folder / MANIFEST_NAME).write_bytes(text)
    error = hold(lambda: read_manifest(folder))
    assert isinstance(error, UsageError) and MANIFEST_NAME in str(error)


def test_fuzz_values(folder: Path, manifests: list[dict[str, Any]]) -> None:
    """Whatever is changed, reading refuses it, or everything that comes after takes it."""

    def check(case: Any) -> None:
        value, fits = case
        hold(lambda: use(folder, fitting(value) if fits else value))

    places = st.sampled_from(manifests).flatmap(mutated)
    parts = st.sampled_from([(m, key) for m in manifests for key in sorted(m)]).flatmap(
        lambda part: mutated(part[0][part[1]]).map(lambda new: {**part[0], part[1]: new})
    )
    fuzz("manifest values", st.tuples(places | parts | JSON_VALUES, st.sampled_from([True, True, True, False])), check)


def test_fuzz_bytes(folder: Path, manifests: list[dict[str, Any]]) -> None:
    """A damaged file is refused, unless it says the same."""
    originals = {json.dumps(value).encode(): value for value in manifests}

    def check(case: tuple[bytes, bytes]) -> None:
        original, changed = case
        (folder / MANIFEST_NAME).write_bytes(changed)

        def read() -> None:
            assert read_manifest(folder).to_dict() == originals[original]

        hold(read)

    cases = st.sampled_from(list(originals)).flatmap(lambda original: st.tuples(st.just(original), damaged(original)))
    fuzz("manifest bytes", cases, check)


def test_an_edit_needs_a_digest(folder: Path, manifests: list[dict[str, Any]]) -> None:
    value = json.loads(json.dumps(manifests[1]))
    value["warnings"] = ["all well"]
    (folder / MANIFEST_NAME).write_text(json.dumps(value))
    with pytest.raises(CladaError, match="edited or damaged"):
        read_manifest(folder)
