"""Models that optimum and onnxruntime-genai exported are inspected and compiled, and held to the graphs as they were."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.tiny_decoders import tiny_decoder
from clada_export import export
from clada_export.artifact.manifest import read_manifest
from clada_export.cli.inspection import inspect_onnx
from clada_export.errors import UnsupportedModelError
from tests.exporters.environment import python_with, run
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer

# optimum-onnx needs transformers before 4.58, and that an older hub client.
OPTIMUM = (
    "optimum==2.1.0",
    "optimum-onnx==0.1.0",
    "transformers==4.57.6",
    "huggingface-hub==0.36.2",
    "tokenizers==0.22.2",
)
GENAI = ("onnxruntime-genai==0.18.0",)
# Gated, packed, plain and transposed projections; the others differ from one of these outside of their FFNs.
OPTIMUM_TYPES = ("llama", "phi3", "opt", "gpt2")
MORE_OPTIMUM_TYPES = ("gemma", "phi", "gptj", "gpt_neox", "falcon")
GENAI_TYPES = ("llama", "phi3")
GENAI_CASES = ("llama", pytest.param("phi3", marks=pytest.mark.long))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of small models: `TYPE`, and `TYPE-sized` with sizes that the builder of onnxruntime-genai takes."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: tiny_decoder(name) for name in (*OPTIMUM_TYPES, *MORE_OPTIMUM_TYPES)}
    made |= {f"{name}-sized": tiny_model(name) for name in GENAI_TYPES}
    for name, model in made.items():
        model.save_pretrained(folder / name)  # type: ignore[operator]
        save_tiny_tokenizer(folder / name)
    return folder


@pytest.fixture(scope="module")
def optimum(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder that optimum wrote, by type."""
    out = tmp_path_factory.mktemp("optimum")

    @functools.cache
    def write(names: tuple[str, ...]) -> None:
        run(python_with(*OPTIMUM), str(Path(__file__).with_name("export_optimum.py")), str(models), str(out), *names)

    def folder(name: str) -> Path:
        # Starting it takes longer than an export, so it makes all that a run needs.
        write(OPTIMUM_TYPES if name in OPTIMUM_TYPES else MORE_OPTIMUM_TYPES)
        return out / name

    return folder


@pytest.fixture(scope="module")
def genai(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The folder that the builder of onnxruntime-genai wrote, by type and precision."""
    out = tmp_path_factory.mktemp("genai")

    @functools.cache
    def folder(name: str, precision: str) -> Path:
        written = out / f"{name}-{precision}"
        places = ("-i", str(models / f"{name}-sized"), "-o", str(written), "-c", str(out / "cache"))
        run(python_with(*GENAI), "-m", "onnxruntime_genai.models.builder", *places, "-p", precision, "-e", "cpu")
        return written

    return folder


def _tokens(folder: Path) -> Path:
    path = folder / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, 250, (12, 32)))
    return path


def _compiled(folder: Path, tmp_path: Path) -> None:
    result = export(
        folder,
        tmp_path / "out",
        sparsity=0.3,
        calibration_tokens=_tokens(tmp_path),
        calibration_context=32,
        calibration_cache=None,
    )
    assert len(result.plan.layers) == 2
    assert result.verification is not None and result.verification.passed
    parity = [check.numbers["max_abs"] for check in result.verification.checks if check.name.startswith("dense parity, prompt")]
    assert parity and max(parity) < 1e-4


@pytest.mark.parametrize("name", [*OPTIMUM_TYPES, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_OPTIMUM_TYPES)])
def test_a_graph_of_optimum(name: str, optimum: Callable[[str], Path], tmp_path: Path) -> None:
    found = inspect_onnx(optimum(name) / "model.onnx")
    assert [layer.rewritten for layer in found.layers] == [True, True], found.layers
    _compiled(optimum(name), tmp_path)


@pytest.mark.parametrize("name", GENAI_CASES)
def test_a_graph_of_onnxruntime_genai(name: str, genai: Callable[[str, str], Path], tmp_path: Path) -> None:
    found = inspect_onnx(genai(name, "fp32") / "model.onnx")
    assert [layer.rewritten for layer in found.layers] == [True, True], found.layers
    _compiled(genai(name, "fp32"), tmp_path)
    # Its attention takes the number of tokens of a row, and counts padding from the end.
    assert read_manifest(tmp_path / "out").padding == "none"


@pytest.mark.parametrize("name", GENAI_CASES)
def test_four_bit_weights_are_named_and_left(name: str, genai: Callable[[str, str], Path]) -> None:
    folder = genai(name, "int4")
    found = inspect_onnx(folder / "model.onnx")
    assert len(found.layers) == 2
    assert all(not layer.rewritten and "quantised weights in MatMulNBits" in layer.reason for layer in found.layers)
    with pytest.raises(UnsupportedModelError, match=r"no feed-forward layer that could be compiled .*quantised"):
        export(folder, folder.with_name("out"), sparsity=0.3)
