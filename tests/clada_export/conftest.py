"""Tiny model folders, and a trace stage that reads kept graphs (a trace takes ten seconds, and most tests need no new one)."""

from __future__ import annotations

import hashlib
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from torch import nn

import clada_export.trace.trace
from clada_export.source.load import weights_digest
from clada_export.trace.trace import TracedModel
from tests.tiny_models import CACHE, tiny_model

TRACES = CACHE.parent / "traces"


def _kept_trace(model: Any, *, fusions: str | None = "cpu") -> TracedModel:
    code = inspect.getsource(clada_export.trace.trace) + model.config.to_json_string() + weights_digest(model) + str(fusions)
    folder = TRACES / hashlib.sha256(code.encode()).hexdigest()[:16]
    if not (folder / "model.onnx").is_file():
        traced = clada_export.trace.trace.trace(model, fusions=fusions)
        temporary = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        ir.save(traced.graph, temporary / "model.onnx")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    return TracedModel(ir.load(folder / "model.onnx"), fusions)


@pytest.fixture
def kept_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pipeline take traces from `.cache/`; the key holds config, weights and the text of the trace stage."""
    monkeypatch.setattr("clada_export.pipeline.trace", _kept_trace)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with safetensors of a tiny model, by kind."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("models") / kind
            model: nn.Module = tiny_model(kind, 0)
            model.save_pretrained(folder)  # type: ignore[operator]
            made[kind] = folder
        return made[kind]

    return make
