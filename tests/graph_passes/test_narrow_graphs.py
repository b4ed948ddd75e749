"""Graphs that compute in float16 or bfloat16: activations, weights and cache."""

from __future__ import annotations

import itertools
from dataclasses import replace

import ml_dtypes
import node_models
import numpy as np
import onnx_ir as ir
import pytest
import tiny_models
import torch
from eager import score_constants
from handmade import HIDDEN, WIDTH, Handmade

from clada_export.native.library import ort_library_path
from graph_passes import FFNRewrite, find_ffns, rewrite_ffns
from graph_passes.op import DOMAIN, ContractError, SparseFFNAttributes, input_names, output_names

TYPES = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}
KINDS = {"llama": "swiglu", "gemma3_text": "geglu_tanh", "gpt2": "gelu_tanh"}
IDS = np.random.default_rng(0).integers(3, 256, (2, 7))
FLOAT, INT8 = ir.DataType.FLOAT, ir.DataType.INT8
ATTRIBUTES = SparseFFNAttributes(score="shadow", load_slope=0.2)
SHADOW = FFNRewrite(ATTRIBUTES, np.array([0.1], dtype=np.float32), score_constants)
# ONNX Runtime has hardly any float16 kernels for the CPU: it casts what stands between others, our node's inputs with it, to
# float32, and so also a shadow's scales, which the op takes in float16 only. (A node on its own is left as it is.)
EXACT = replace(SHADOW, attributes=replace(ATTRIBUTES, score="exact"))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float16) for kind in KINDS),
        ("gemma3_text", torch.bfloat16),
        *(pytest.param(kind, torch.bfloat16, marks=pytest.mark.long) for kind in ("llama", "gpt2")),
    ],
    ids=str,
)
def test_every_layer_is_rewritten_in_the_graphs_type(kind: str, dtype: torch.dtype) -> None:
    names, narrow = tiny_models.ffn_names(kind), TYPES[dtype]
    model = tiny_models.export_tiny(kind, dtype=dtype)
    matches = find_ffns(model, names).matches
    assert [(match.name, match.kind, match.dtype) for match in matches] == [(name, KINDS[kind], narrow) for name in names]
    seen: list[np.dtype] = []

    def constants(w_in: np.ndarray, w_out: np.ndarray) -> dict[str, np.ndarray]:
        seen.extend((w_in.dtype, w_out.dtype))
        return dict(score_constants(w_in, w_out))

    report = rewrite_ffns(model, dict.fromkeys(names, replace(SHADOW, make_constants=constants)))
    assert len(report.ffns) == 2 and report.misses == []
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    types = {"x": narrow, "w_in": narrow, "w_out": narrow, "y": narrow, "active": ir.DataType.INT32}
    types |= {"shadow": INT8, "shadow_scale": ir.DataType.FLOAT16}
    for node in nodes:
        settled = replace(ATTRIBUTES, emit_active=True, gated=kind != "gpt2", has_bias=kind == "gpt2")
        named = itertools.chain(
            zip(input_names(settled), node.inputs, strict=True), zip(output_names(settled), node.outputs, strict=True)
        )
        for name, value in named:
            assert value is not None and value.dtype == types.get(name, FLOAT), name
            if value.const_value is not None:
                value.const_value.numpy()  # constants are made when they are read
    assert seen == [np.float32] * 4
    assert model.graph.outputs[-1].name == "active_neurons" and model.graph.outputs[-1].dtype == ir.DataType.INT32
    # The full checker goes through the function as well, and refuses operands of different types.
    node_models.check(model)


@pytest.mark.parametrize("library", [True, False], ids=["library", "function"])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_float16_is_as_near_to_float32_as_eager_float16(kind: str, library: bool) -> None:
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        narrow = tiny_models.tiny_model(kind).half()(ids).logits.float().numpy()
        exact = tiny_models.tiny_model(kind).half().float()(ids).logits.numpy()

    def error(logits: np.ndarray) -> float:
        return float(np.sqrt(np.mean((logits - exact) ** 2)))

    # A rounding to float16 moves a value by half an ulp, 2^-11 of it, at most. The few hundred roundings on the way to a logit
    # add up like random numbers: to the square root of their count, about 2^4.
    assert error(narrow) < 2**-7 * float(np.sqrt(np.mean(exact**2)))
    model = tiny_models.export_tiny(kind, dtype=torch.float16)
    rewrite_ffns(model, dict.fromkeys(tiny_models.ffn_names(kind), EXACT))
    feeds = tiny_models.prompt_feeds(model.graph.inputs, IDS) | {"load": np.full(IDS.shape, np.inf, dtype=np.float32)}
    session = tiny_models.session(model, ort_library_path() if library else None)
    # The op rounds a layer once, eager PyTorch at every step, so that is the bound.
    assert error(session.run(["logits"], feeds)[0].astype(np.float32)) < error(narrow)


def test_sparse_float16_follows_the_load() -> None:
    model = tiny_models.export_tiny("llama", dtype=torch.float16)
    rewrite_ffns(model, dict.fromkeys(tiny_models.ffn_names("llama"), EXACT))
    feeds = tiny_models.prompt_feeds(model.graph.inputs, IDS) | {"load": np.zeros(IDS.shape, dtype=np.float32)}
    native, body = (
        tiny_models.session(model, library).run(["active_neurons"], feeds)[0] for library in (ort_library_path(), None)
    )
    assert 5 < native.mean() < 91
    # Neurons whose score lies within a rounding of the threshold.
    assert np.abs(native - body).max() <= 2


@pytest.mark.parametrize("wanted", [ir.DataType.FLOAT, ir.DataType.BFLOAT16])
def test_other_weights_than_the_graphs_are_refused(wanted: ir.DataType) -> None:
    model = tiny_models.export_tiny("llama", dtype=torch.float16)
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(ContractError, match=r"model\.layers\.0\.mlp\.down_proj: .*x has type float16; wanted float32"):
        rewrite_ffns(model, dict.fromkeys(tiny_models.ffn_names("llama"), EXACT), weight_dtype=wanted)
    assert ir.to_proto(model).SerializeToString() == before


def test_casts_inside_a_layer_are_looked_through() -> None:
    """An activation computed in float32 between projections in float16."""
    g = Handmade()
    half, full = int(ir.DataType.FLOAT16), int(ir.DataType.FLOAT)
    weights = [
        g.const(name, (g.rng.standard_normal(shape) / 4).astype(np.float16))
        for name, shape in (("g", (HIDDEN, WIDTH)), ("u", (HIDDEN, WIDTH)), ("d", (WIDTH, HIDDEN)))
    ]
    x = g.op("Cast", g.x, to=half, shape=["b", "s", HIDDEN])
    gate = g.op("Cast", g.silu(g.op("Cast", g.matmul(x, weights[0]), to=full)), to=half)
    y = g.matmul(g.op("Mul", gate, g.matmul(x, weights[1])), weights[2], module="mlp.down_proj")
    (match,) = find_ffns(g.model(y)).matches
    assert (match.kind, match.dtype, match.x) == ("swiglu", ir.DataType.FLOAT16, x)


def test_a_layer_of_two_types_is_refused() -> None:
    g = Handmade()
    gate, up = (g.const(name, np.ones((HIDDEN, WIDTH), dtype=np.float16)) for name in ("g", "u"))
    hidden = g.op("Mul", g.silu(g.matmul(g.x, gate)), g.matmul(g.x, up))
    wide = g.op("Cast", hidden, to=int(ir.DataType.FLOAT))
    y = g.matmul(wide, g.weight("d", WIDTH, HIDDEN), module="mlp.down_proj")
    (miss,) = find_ffns(g.model(y)).misses
    assert "'d' is FLOAT, and 'u' is FLOAT16; one type is needed" in miss.reason


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_constants_of_an_activation_that_were_rounded(activation: str, dtype: type[np.generic]) -> None:
    g = Handmade()

    def scalar(value: float) -> ir.Value:
        return g.const(f"scalar_{len(g.initializers)}", np.array(value, dtype=np.float32).astype(dtype))

    def weight(name: str, *shape: int) -> ir.Value:
        return g.const(name, np.ones(shape, dtype=np.float32).astype(dtype))

    v = g.matmul(g.x, weight("u", HIDDEN, WIDTH))
    if activation == "gelu":
        inner = g.op("Erf", g.op("Div", v, scalar(2**0.5)))
    else:
        cube = g.op("Mul", g.op("Pow", v, scalar(3.0)), scalar(0.044715))
        inner = g.op("Tanh", g.op("Mul", g.op("Add", v, cube), scalar((2 / np.pi) ** 0.5)))
    hidden = g.op("Mul", g.op("Mul", v, scalar(0.5)), g.op("Add", inner, scalar(1.0)))
    (match,) = find_ffns(g.model(g.matmul(hidden, weight("d", WIDTH, HIDDEN), module="mlp.fc2"))).matches
    assert match.activation == activation
