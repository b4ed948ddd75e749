"""Decoders whose configuration or layers are arranged in another way than a Llama's, exported whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tiny_decoders import tiny_decoder
from clada_export import load_engine
from clada_export.decoder.model_config import text_config
from clada_export.pipeline import ExportResult, export
from clada_export.source.load import load_source


def exported(model_type: str, folder: Path) -> ExportResult:
    tiny_decoder(model_type).save_pretrained(folder / "model")  # type: ignore[operator]
    return export(folder / "model", folder / "out", sparsity=0.3, calibration_context=32, calibration_cache=None)


@pytest.mark.parametrize("model_type", ["gemma3", pytest.param("fuyu", marks=pytest.mark.long)])
def test_a_model_of_text_and_images_keeps_the_settings_of_its_text_apart(model_type: str, tmp_path: Path) -> None:
    result = exported(model_type, tmp_path)
    assert result.verification is not None and result.verification.passed
    source = load_source(str(tmp_path / "model"))
    assert not hasattr(source.decoder.module.config, "vocab_size")
    assert source.decoder.vocab_size == load_engine(tmp_path / "out").vocab_size == 256  # type: ignore[arg-type]
    assert source.decoder.sequence_limit == text_config(source.decoder.module).max_position_embeddings  # type: ignore[arg-type]


@pytest.mark.long
def test_an_ffn_that_a_token_runs_more_than_once(tmp_path: Path) -> None:
    result = exported("hrm_text", tmp_path)
    assert result.verification is not None and result.verification.passed
    runs = result.manifest.ffn_runs
    assert {layer.name for layer in result.plan.layers} == set(runs) and min(runs.values()) > 1
    engine = load_engine(tmp_path / "out")
    neurons = sum(layer.intermediate_size * runs[layer.name] for layer in result.plan.layers)
    assert engine.sparse_neurons == neurons
    output = engine.prefill([[5, 6, 7]])
    assert output.active is not None and output.active.shape == (1, sum(runs.values())) and output.active.sum() == neurons
    assert 0.1 < result.manifest.drift["sparsity"] < 0.5


def test_the_decoder_of_a_model_of_text_and_images_may_come_alone(tmp_path: Path) -> None:
    result = exported("emu3", tmp_path)
    assert result.verification is not None and result.verification.passed
    # No configuration of text alone is in the table of decoders; the class's name tells.
    assert load_source(str(tmp_path / "model")).decoder.config.model_type == "emu3_text_model"
