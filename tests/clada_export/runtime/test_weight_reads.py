"""The bytes that `clada bench` counts, and the memory that it measures."""

from __future__ import annotations

import mmap
from dataclasses import asdict, replace
from typing import Any

import pytest

from clada_export.artifact.manifest import Manifest
from clada_export.plan.layer import LayerPlan, RouterForm
from clada_export.runtime import peak_memory
from clada_export.runtime.weight_reads import ffn_bytes, weight_bytes
from tests.clada_export.runtime.test_runtime import make_manifest

HIDDEN, NEURONS = 64, 128
LAYER = LayerPlan("a.down_proj", "silu", True, HIDDEN, NEURONS, (0.1,))
WEIGHTS = {
    "form": "int5",
    "ffn": {"bits": 5, "matrices": 3, "bytes": 1},
    "attention": {"bits": 6, "matrices": 4, "bytes": 1000},
    "head": {"bits": 6, "matrices": 1, "bytes": 200},
    "embedding": {"bits": 8, "matrices": 1, "bytes": 9999},
}


def manifest(score: str, *layers: LayerPlan, **changes: Any) -> Manifest:
    plan = {**make_manifest().plan, "score": score, "layers": [asdict(layer) for layer in layers]}
    return make_manifest(plan=plan, **changes)


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_bytes_of_ffns(dtype: str, item: int) -> None:
    """Of three rows a neuron: all of a dense step, whatever the score; gate, or gate and up, of every neuron otherwise."""
    matrix = HIDDEN * NEURONS * item
    for score, wanted in (("gate", 1 + 2 * 0.25), ("exact", 2 + 0.25)):
        found = manifest(score, LAYER, replace(LAYER, name="b.down_proj"), dtype=dtype, ffn_runs={"b.down_proj": 3})
        assert ffn_bytes(found, 0.25) == pytest.approx(4 * wanted * matrix)
        assert ffn_bytes(found, 1.0) == 4 * 3 * matrix
        assert weight_bytes(found, 0.25) is None
    assert ffn_bytes(manifest("shadow", LAYER, dtype=dtype), 1.0) == 3 * matrix


def test_bytes_of_quantised_engines() -> None:
    found = manifest("exact", LAYER, weights=WEIGHTS)
    ffn = HIDDEN * NEURONS * 2.5 * 5.5 / 8
    assert ffn_bytes(found, 0.5) == pytest.approx(ffn)
    assert weight_bytes(found, 0.5) == pytest.approx(ffn + 1200)
    tied = {kind: value for kind, value in WEIGHTS.items() if kind != "head"}
    assert weight_bytes(manifest("exact", LAYER, weights=tied), 0.5) == pytest.approx(ffn + 1000)


def test_routers_are_read_too_and_nobody_says_how_large_they_are() -> None:
    found = manifest("external", replace(LAYER, router=RouterForm(2, "silu", "sigmoid", False, 1.0)), weights=WEIGHTS)
    assert ffn_bytes(found, 0.5) is None and weight_bytes(found, 0.5) is None


def test_peaks_of_memory() -> None:
    size = 64 << 20
    peak_memory.begin()
    before = peak_memory.peak()
    assert before is not None
    taken = mmap.mmap(-1, size)  # no allocator keeps it when it is given back
    for _ in range(size >> 20):
        taken.write(b"x" * (1 << 20))
    during = peak_memory.peak()
    assert during is not None and during > before + size // 2
    taken.close()
    peak_memory.begin()
    after = peak_memory.peak()
    assert after is not None and after < during - size // 2
