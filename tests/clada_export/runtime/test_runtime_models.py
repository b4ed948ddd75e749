"""The engine over exported models: ragged batches, prompts in pieces and decoding give what eager PyTorch gives."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from clada_export.artifact.manifest import CacheTensor, TensorSpec, file_record, write_manifest
from clada_export.errors import BackendError
from clada_export.load.signal import LoadSignal
from clada_export.native.library import ort_library_path
from clada_export.plan.plan import SparsityPlan
from clada_export.runtime import Engine, load_engine
from clada_export.runtime import engine as engine_module
from graph_passes import AddLoadOutputs, FFNRewrite, name_interface, rewrite_ffns
from graph_passes.op import SparseFFNAttributes
from tests import tiny_models
from tests.clada_export.runtime.test_runtime import make_manifest

PROMPTS = [np.random.default_rng(length).integers(3, 256, length).tolist() for length in (9, 1, 5, 23)]


def shape(value: ir.Value) -> tuple[int | str, ...]:
    assert value.shape is not None
    return tuple(int(str(axis)) if str(axis).isdigit() else str(axis) for axis in value.shape)


SPARSE = SparseFFNAttributes(load_slope=0.2, load_min=0.5, load_max=2.0)
WITH_PROMPT_STATISTIC = replace(SPARSE, rule="relative", score="prefix", use_stat=True, emit_stat=True)


def write_export(folder: Path, kind: str, attributes: SparseFFNAttributes | None) -> Path | None:
    """An export folder of a tiny model; the library that goes with it, or None if there is none."""
    graph = tiny_models.export_tiny(kind)
    name_interface(graph)
    if attributes is not None:
        threshold = np.array([0.3], dtype=np.float32)
        rewrite_ffns(graph, {name: FFNRewrite(attributes, threshold) for name in tiny_models.ffn_names(kind)})
    AddLoadOutputs()(graph)
    folder.mkdir(parents=True)
    ir.save(graph, folder / "model.onnx")
    (folder / "config.json").write_text(tiny_models.tiny_config(kind).to_json_string())
    library = None
    if attributes is not None:
        with suppress(BackendError):
            library = shutil.copy(ort_library_path(), folder / "libclada_ort.so")
    plan = SparsityPlan("clada", "gate", "threshold", (), LoadSignal(), {"weights_digest": "0"})
    past = [value for value in graph.graph.inputs if str(value.name).startswith("past_")]
    manifest = make_manifest(
        plan=plan.to_dict(),
        load_signal=LoadSignal(surprisal_mean=3.0),
        inputs=(),
        outputs=tuple(TensorSpec(str(value.name), "float32", shape(value)) for value in graph.graph.outputs),
        cache=tuple(
            CacheTensor(
                int(re.findall(r"\d+", name)[0]),
                "stat" if name.startswith("past_stat") else name.rsplit(".", 1)[1],
                name,
                name.replace("past_key_values", "present").replace("past_stat", "present_stat"),
                "float32",
                shape(value),
            )
            for value in past
            for name in [str(value.name)]
        ),
        library="libclada_ort.so" if library else None,
    )
    write_manifest(folder, manifest.with_files({path.name: file_record(path) for path in folder.iterdir()}))
    return library


def check_against_eager(engine: Engine, kind: str) -> None:
    model = tiny_models.tiny_model(kind)
    with torch.no_grad():
        for row, logits in zip(PROMPTS, engine.logits(PROMPTS), strict=True):
            np.testing.assert_allclose(logits, model(torch.tensor([row])).logits[0].numpy(), rtol=1e-4, atol=1e-4)
        made = engine.generate(PROMPTS, 10, load="dense", eos_token_id=[]).tokens
        for row, tokens in zip(PROMPTS, made, strict=True):
            wanted = model.generate(torch.tensor([row]), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
            assert tokens == wanted[0, len(row) :].tolist()


@pytest.mark.parametrize("chunk", [4, 1024])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_dense_graphs(tmp_path: Path, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_export(tmp_path / "out", kind, None)
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", chunk)
    check_against_eager(load_engine(tmp_path / "out", threads=1), kind)


def test_sparse_graph_without_and_with_the_library(tmp_path: Path) -> None:
    library = write_export(tmp_path / "out", "llama", SPARSE)
    body = load_engine(tmp_path / "out", threads=1, use_library=False)
    check_against_eager(body, "llama")
    if library is None:
        pytest.skip("the native library is not built; only the function body was checked")
    native = load_engine(tmp_path / "out", threads=1, verify_files=True)
    check_against_eager(native, "llama")
    results = [engine.generate(PROMPTS, 8, load="auto", eos_token_id=[]) for engine in (body, native)]
    assert results[0].tokens == results[1].tokens
    np.testing.assert_allclose(results[0].loads, results[1].loads, atol=1e-4)
    assert results[1].active is not None
    assert results[0].active is not None
    np.testing.assert_array_equal(results[0].active, results[1].active)
    assert 0 < results[1].active.mean() < 96


def test_a_row_does_not_depend_on_the_others(tmp_path: Path) -> None:
    write_export(tmp_path / "out", "llama", SPARSE)
    engine = load_engine(tmp_path / "out", threads=1)
    together = engine.generate(PROMPTS, 8, load="auto", eos_token_id=[])
    for row, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], 8, load="auto", eos_token_id=[])
        assert alone.tokens[0] == together.tokens[row]
        np.testing.assert_allclose(alone.loads[:, 0], together.loads[:, row], atol=1e-4)


def test_the_prompt_statistic_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_export(tmp_path / "out", "llama", WITH_PROMPT_STATISTIC)
    engine = load_engine(tmp_path / "out", threads=1)
    assert {tensor.role for tensor in engine.manifest.cache} == {"key", "value", "stat"}
    whole = engine.generate(PROMPTS, 6, load=0.0, eos_token_id=[])
    assert whole.active is not None
    assert 0 < whole.active.min() < whole.active.max() < 96
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 4)
    pieces = engine.generate(PROMPTS, 6, load=0.0, eos_token_id=[])
    assert pieces.tokens == whole.tokens
    np.testing.assert_array_equal(pieces.active, whole.active)
