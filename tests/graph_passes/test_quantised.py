"""Layers in 8 bits, as ONNX Runtime's own quantiser writes them, are seen, named with the reason, and left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tiny_models
from handmade import HIDDEN, WIDTH, Handmade
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

from clada_export.source.onnx.graph import readable_graph
from graph_passes import find_ffns

IDS = np.random.default_rng(0).integers(3, 256, (2, 7))
KINDS = ("llama", "phi3", "gpt2")


class _OnePrompt(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, model: ir.Model) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = iter([tiny_models.prompt_feeds(model.graph.inputs, IDS)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


@pytest.fixture(params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ir.Model, Path]:
    """A tiny model's graph, and the file it lies in."""
    model = tiny_models.export_tiny(request.param)
    ir.save(model, tmp_path / "float.onnx")
    return model, tmp_path / "float.onnx"


def _reasons(path: Path) -> list[str]:
    # The quantiser writes no shapes.
    search = find_ffns(readable_graph(path))
    assert search.matches == []
    return [miss.reason for miss in search.misses]


def test_weights_in_8_bits_and_activations_at_run_time(source: tuple[ir.Model, Path]) -> None:
    path = source[1].with_name("dynamic.onnx")
    quantize_dynamic(source[1], path)
    reasons = _reasons(path)
    assert len(reasons) == 2 and all(reason.startswith("quantised weights in MatMulInteger") for reason in reasons)


def test_weights_and_activations_between_quantise_and_dequantise(source: tuple[ir.Model, Path]) -> None:
    model, path = source
    quantize_static(path, path.with_name("static.onnx"), _OnePrompt(model), quant_format=QuantFormat.QDQ)
    reasons = _reasons(path.with_name("static.onnx"))
    assert len(reasons) == 2 and all(reason.startswith("quantised weights behind DequantizeLinear") for reason in reasons)


@pytest.mark.parametrize("where", ["hidden", "up"])
def test_activations_that_are_rounded_are_not_taken_for_others(where: str) -> None:
    """Weights are float, values in the layer go through 8 bits: the op would not round them."""
    g = Handmade()

    def rounded(value: ir.Value) -> ir.Value:
        scale = g.scalar(0.1)
        shape = ["b", "s", WIDTH]
        return g.op("DequantizeLinear", g.op("QuantizeLinear", value, scale, shape=shape), scale, shape=shape)

    up = g.matmul(g.x, g.weight("u", HIDDEN, WIDTH))
    hidden = g.op("Relu", rounded(up) if where == "up" else up)
    y = g.matmul(rounded(hidden) if where == "hidden" else hidden, g.weight("d", WIDTH, HIDDEN), module="mlp.down_proj")
    search = find_ffns(g.model(y))
    (miss,) = search.misses
    assert search.matches == [] and "quantised activations: QuantizeLinear" in miss.reason


@pytest.mark.parametrize("op_type", ["MoE", "QMoE"])
def test_experts_in_one_operator_are_named(op_type: str) -> None:
    g = Handmade()
    y = g.op(op_type, g.x, g.weight("router", HIDDEN, 4), domain="com.microsoft", module="layers.0.mlp")
    search = find_ffns(g.model(y))
    (miss,) = search.misses
    assert search.matches == [] and miss.name == "layers.0.mlp" and miss.reason.startswith(f"MoE: {op_type} ")
