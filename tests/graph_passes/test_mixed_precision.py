"""Casts in and around a layer: weights kept in 16 bits, activations computed in another type than the products."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import tiny_models
from handmade import HIDDEN, WIDTH, Handmade, dense_rewrite, rewrite_only, rewritten_alike, run
from onnxruntime.transformers.float16 import convert_float_to_float16

from graph_passes import find_ffns, rewrite_ffns

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def _cast(g: Handmade, value: ir.Value, to: ir.DataType) -> ir.Value:
    result = g.op("Cast", value, to=to.value, shape=None if value.shape is None else list(value.shape))
    result.dtype = to
    return result


def _half(g: Handmade, name: str, *shape: int) -> ir.Value:
    return g.const(name, (g.rng.standard_normal(shape) / 4).astype(np.float16))


def _weights_in_half(where: str) -> ir.Model:
    """x and every product are float32; the weights (and a bias) are cast to it, before or after a Transpose."""
    g = Handmade()

    def weight(name: str, rows: int, columns: int) -> ir.Value:
        if where == "plain":
            return _cast(g, _half(g, name, rows, columns), FLOAT)
        stored = _half(g, name, columns, rows)
        if where == "before":
            return g.op("Transpose", _cast(g, stored, FLOAT), perm=[1, 0], shape=[rows, columns])
        turned = g.op("Transpose", stored, perm=[1, 0], shape=[rows, columns])
        turned.dtype = HALF
        return _cast(g, turned, FLOAT)

    up = g.op("Add", g.matmul(g.x, weight("u", HIDDEN, WIDTH)), _cast(g, _half(g, "b", WIDTH), FLOAT), shape=["b", "s", WIDTH])
    hidden = g.op("Mul", g.silu(g.matmul(g.x, weight("g", HIDDEN, WIDTH))), up)
    return g.model(g.matmul(hidden, weight("d", WIDTH, HIDDEN), module="mlp.down_proj"))


@pytest.mark.parametrize("where", ["plain", "before", "after"])
def test_weights_that_are_kept_in_16_bits(where: str) -> None:
    match = rewritten_alike(_weights_in_half(where), _weights_in_half(where))
    assert match.dtype == FLOAT and match.up.value.dtype == HALF and match.has_bias
    assert find_ffns(_weights_in_half(where)).misses == []


def test_a_weight_that_is_cast_twice_is_left() -> None:
    """The first Cast rounds it, which the stored weight is not."""
    g = Handmade()
    narrow = _cast(g, g.weight("u", HIDDEN, WIDTH), HALF)
    hidden = g.op("Relu", g.matmul(g.x, _cast(g, narrow, FLOAT)))
    search = find_ffns(g.model(g.matmul(hidden, g.weight("d", WIDTH, HIDDEN), module="mlp.down_proj")))
    (miss,) = search.misses
    assert search.matches == [] and "weight 'u' is cast twice" in miss.reason


def test_hidden_values_in_8_bits_are_left() -> None:
    g = Handmade()
    hidden = g.op("Relu", g.matmul(g.x, g.weight("u", HIDDEN, WIDTH)))
    coarse = _cast(g, _cast(g, hidden, ir.DataType.FLOAT8E4M3FN), FLOAT)
    search = find_ffns(g.model(g.matmul(coarse, g.weight("d", WIDTH, HIDDEN), module="mlp.down_proj")), ["mlp.down_proj"])
    assert search.matches == [] and "is the result of Cast" in search.misses[0].reason


def _layer_in_half(*, wide_activation: bool) -> ir.Model:
    """x and y are float32, the products float16 between two Casts; the activation may be float32."""
    g = Handmade()
    x = _cast(g, g.x, HALF)

    def product(value: ir.Value, name: str, rows: int, columns: int, module: str = "") -> ir.Value:
        result = g.matmul(value, _half(g, name, rows, columns), module)
        result.dtype = HALF
        return result

    gate, up = (product(x, name, HIDDEN, WIDTH) for name in ("g", "u"))
    if wide_activation:
        hidden = _cast(g, g.op("Mul", g.silu(_cast(g, gate, FLOAT)), _cast(g, up, FLOAT), shape=["b", "s", WIDTH]), HALF)
    else:
        sigmoid = g.op("Sigmoid", gate)
        silu = g.op("Mul", gate, sigmoid)
        hidden = g.op("Mul", silu, up)
        for value in (sigmoid, silu, hidden):
            value.dtype = HALF
    return g.model(_cast(g, product(hidden, "d", WIDTH, HIDDEN, "mlp.down_proj"), FLOAT))


@pytest.mark.parametrize("wide_activation", [True, False])
def test_a_layer_between_casts_keeps_its_type(wide_activation: bool) -> None:
    before, after = (_layer_in_half(wide_activation=wide_activation) for _ in range(2))
    (match,) = find_ffns(before).matches
    assert match.dtype == HALF and match.x.dtype == HALF
    wanted = run(before)
    rewrite_only(after)
    found = run(after, load=np.full((2, 3), np.inf, np.float32))
    (name,) = wanted
    # Both round to float16 in other places: h in between, sums of WIDTH products; eps is 2 ** -10.
    np.testing.assert_allclose(found[name], wanted[name], atol=4 * 2**-10 * float(np.abs(wanted[name]).max()))


IDS = np.random.default_rng(0).integers(3, 256, (2, 7))
ACTIVATIONS = ["Sigmoid", "Mul", "Add", "Tanh", "Pow", "Relu"]
PRODUCTS = ["MatMul", "Gemm"]


def _logits(model: ir.Model, **more: np.ndarray) -> np.ndarray:
    # Tools for 16 bits turn the cache to it too, unless told otherwise.
    feeds = {**tiny_models.prompt_feeds(model.graph.inputs, IDS), **more}
    result: np.ndarray = tiny_models.session(model).run(["logits"], feeds)[0]
    return result


@pytest.mark.parametrize("wide", [[], ACTIVATIONS, PRODUCTS], ids=["nothing", "activations", "products"])
@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "opt"])
def test_models_that_onnx_runtimes_tool_made_float16(kind: str, wide: list[str]) -> None:
    """`wide`: operators that stay float32. The tool gives each reader of a value a Cast of its own."""
    exact = _logits(tiny_models.export_tiny(kind))
    proto = ir.to_proto(tiny_models.export_tiny(kind))
    model = ir.from_proto(convert_float_to_float16(proto, keep_io_types=True, op_block_list=wide))
    before = _logits(model)
    names = tiny_models.ffn_names(kind)
    search = find_ffns(model, names)
    assert [match.name for match in search.matches] == names and search.misses == []
    assert {match.dtype for match in search.matches} == {FLOAT if wide is PRODUCTS else HALF}
    rewrite_ffns(model, dict.fromkeys(names, dense_rewrite()))
    after = _logits(model, load=np.full(IDS.shape, np.inf, np.float32))
    # Hidden values are rounded in other places than before: no worse than twice what 16 bits cost the graph as it was.
    assert np.abs(before - exact).max() > 0 and np.abs(after - exact).max() <= 2 * np.abs(before - exact).max()
