"""One engine of a tiny model with a tokenizer, for all tests of the samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from clada_export.export_options import ExportOptions
from clada_export.pipeline import export
from tests.benchmarks.tiny import write_tiny_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder."""
    folder = tmp_path_factory.mktemp("samples") / "tiny"
    write_tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def engine(model: Path) -> Path:
    """The engine's folder."""
    out = model.with_name("engine")
    export(model, out, ExportOptions(sparsity=0.5, calibration_context=64))
    return out
