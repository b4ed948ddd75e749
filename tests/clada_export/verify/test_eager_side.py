"""The eager side: rows together are as rows alone, no layer's tensors outlive it, and nothing is left of the engine."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clada_export.verify.eager
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.load.signal import LoadSignal
from clada_export.pipeline import export
from clada_export.plan.layer import LayerPlan
from clada_export.plan.plan import SparsityPlan
from clada_export.targets.ort import target
from clada_export.verify.eager import ReferenceModel, best_tokens, dense_rows, greedy, idle
from clada_export.verify.set_aside import SMALL, SetAside
from tests.tiny_models import tiny_model

Folder = Callable[[str], Path]
ROWS = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [30, 31, 32, 33, 34]]


def plan_for(decoder: TorchDecoder, score: str = "shadow", **settings: Any) -> SparsityPlan:
    layers = tuple(
        LayerPlan(ffn.name, ffn.activation, ffn.gated, ffn.hidden_size, ffn.intermediate_size, (0.1,), 0.3, **settings)
        for ffn in decoder.ffns
    )
    return SparsityPlan("clada", score, "threshold", layers, LoadSignal(), {"weights_digest": "0"})


def loads_of(rows: list[list[int]]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.where(np.arange(len(row)) < 2, np.inf, rng.uniform(-1, 1, len(row))).astype(np.float32) for row in rows]


@pytest.mark.parametrize(
    ("kind", "score", "settings"),
    [("llama", "shadow", {}), ("opt", "exact", {}), ("gpt2", "exact", {"prior_gamma": 0.5, "backbone_min": 0.1})],
)
def test_rows_together_are_rows_alone(kind: str, score: str, settings: dict[str, float]) -> None:
    """Padding on the right is seen by none, and the statistic of a text is its own."""
    decoder = TorchDecoder(tiny_model(kind, 0))
    reference = ReferenceModel(decoder, plan_for(decoder, score, **settings))
    loads = loads_of(ROWS)
    together = reference.run_all(ROWS, loads, last=2)
    for row, load, found in zip(ROWS, loads, together, strict=True):
        alone = reference.run(row, load)
        np.testing.assert_allclose(found.logits, alone.logits[-2:], atol=2e-5)
        np.testing.assert_array_equal(found.active, alone.active)
        assert 0 < alone.active[:, 2:].mean() < decoder.ffns[0].intermediate_size
        for one, other in zip(found.stats, alone.stats, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_layer_is_derived_when_it_runs_and_let_go_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = TorchDecoder(tiny_model("llama", 0))
    made: list[weakref.ref[torch.Tensor]] = []
    derive = clada_export.verify.eager.derive_tensors

    def watched(*arguments: Any) -> Any:
        gc.collect()
        assert not [reference for reference in made if reference() is not None]
        tensors = derive(*arguments)
        made.extend(weakref.ref(tensor) for tensor in (tensors.w_in, tensors.shadow) if tensor is not None)
        return tensors

    monkeypatch.setattr(clada_export.verify.eager, "derive_tensors", watched)
    names: list[str] = []
    ReferenceModel(decoder, plan_for(decoder)).run_all(ROWS, loads_of(ROWS), seen=lambda name, tensors: names.append(name))
    assert names == [ffn.name for ffn in decoder.ffns] and len(made) == 2 * len(names)


def test_dense_rows_of_several_lengths() -> None:
    decoder = TorchDecoder(tiny_model("llama", 0))
    rows = [*ROWS, ROWS[0][::-1]]
    for at_once in (1, 1 << 20):
        for row, found in zip(rows, dense_rows(decoder, rows, lambda index, logits: logits, at_once), strict=True):
            np.testing.assert_allclose(found, decoder.dense_logits(row), atol=2e-5)


def test_a_text_is_greedy_if_it_holds_the_best_tokens() -> None:
    decoder = TorchDecoder(tiny_model("llama", 0))
    prompts = [[5, 6, 7], [40, 41, 42]]
    texts = [[*prompt, *new] for prompt, new in zip(prompts, greedy(decoder, prompts, 9), strict=True)]
    found = dense_rows(decoder, [text[:-1] for text in texts], lambda index, logits: best_tokens(logits[2:]))
    assert [best.tokens for best in found] == [text[3:] for text in texts]
    assert all(gap > 0 for best in found for gap in best.gaps)


def test_idle_projections_are_as_before_afterwards() -> None:
    decoder = TorchDecoder(tiny_model("llama", 0))
    before = decoder.dense_logits(ROWS[0])
    with pytest.raises(RuntimeError, match="stop"), idle(decoder.ffns * 2):
        assert np.abs(decoder.dense_logits(ROWS[0]) - before).max() > 1e-3
        raise RuntimeError("stop")
    np.testing.assert_array_equal(decoder.dense_logits(ROWS[0]), before)


def test_what_is_set_aside_has_no_name(tmp_path: Path) -> None:
    aside = SetAside(tmp_path)
    large = np.arange(SMALL, dtype=np.float32).reshape(2, -1)
    kept = [aside.keep(large + number) for number in range(3)]
    assert list(tmp_path.iterdir()) == []
    for number, found in enumerate(kept):
        assert isinstance(found, np.memmap)
        np.testing.assert_array_equal(found, large + number)
    small = large[:, :4]
    assert aside.keep(small) is small
    assert SetAside(tmp_path / "missing").keep(large).sum() == large.sum()


def test_the_engine_is_closed_before_the_eager_model_runs(
    model_folder: Folder, kept_traces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[Any]] = []
    checks = importlib.import_module("clada_export.verify.verify")  # the package calls a function so, too
    load, dense = target.load_engine, checks.dense_rows

    def loaded(*arguments: Any, **named: Any) -> Any:
        engine = load(*arguments, **named)
        opened.append(weakref.ref(engine._session))
        return engine

    def asked(*arguments: Any) -> Any:
        assert [reference() for reference in opened] == [None]
        return dense(*arguments)

    monkeypatch.setattr(target, "load_engine", loaded)
    monkeypatch.setattr(checks, "dense_rows", asked)
    result = export(model_folder("llama"), tmp_path / "out", sparsity=0.5, calibration_context=48, load_response=False)
    assert result.verification is not None and result.verification.passed and len(opened) == 1
