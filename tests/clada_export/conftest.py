"""Tiny model folders, and a trace stage that reads kept graphs (a trace takes ten seconds, and most tests need no new one)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from torch import nn

import clada_export.trace.trace
from clada_export.decoder.digest import weights_digest
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.trace.trace import TracedModel
from tests.kept import kept, sources, versions
from tests.tiny_models import tiny_model

# What a trace is made by.
_STAGE = (Path("clada_export", "trace"), *(Path("graph_passes", name) for name in ("emit.py", "naming.py", "positions.py")))


def _kept_trace(decoder: TorchDecoder, *, fusions: str | None = "cpu") -> TracedModel:
    key = "\n".join(
        (versions(), sources(*_STAGE), decoder.config.to_json_string(), weights_digest(decoder.module), str(fusions))
    )

    def make(folder: Path) -> None:
        ir.save(clada_export.trace.trace.trace(decoder, fusions=fusions).graph, folder / "model.onnx")

    return TracedModel(ir.load(kept("traces", key, make) / "model.onnx"), fusions)


@pytest.fixture
def kept_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pipeline take traces from `.cache/`; the key holds config, weights and the sources of the trace stage."""
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


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray with two CPUs for all tests of this module: it takes seconds to start."""
    found = pytest.importorskip("ray", reason="ray is not installed")
    before = {name: os.environ.get(name) for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")}
    os.environ |= dict.fromkeys(before, "0")
    found.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield found
    found.shutdown()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
