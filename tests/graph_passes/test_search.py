"""Which layers are found, which are refused, and why."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import tiny_models
from handmade import HIDDEN, WIDTH, Handmade

from graph_passes import find_ffns

KIND_OF = {"gemma": "geglu_tanh", "gemma3_text": "geglu_tanh", "opt": "relu", "gpt2": "gelu_tanh"}


@pytest.mark.parametrize("fusions", [None, "cpu"])
@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_every_layer_of_a_supported_family_is_found(kind: str, fusions: str | None) -> None:
    names = tiny_models.ffn_names(kind)
    search = find_ffns(tiny_models.export_tiny(kind, fusions), names)
    assert [match.name for match in search.matches] == names
    assert search.misses == []
    for match in search.matches:
        assert (match.kind, match.hidden_size, match.intermediate_size) == (KIND_OF.get(kind, "swiglu"), 64, 96)
        assert match.has_bias == (kind in ("opt", "gpt2"))


def test_a_mixture_of_experts_is_a_miss_with_its_reason() -> None:
    names = ["model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.down_proj"]
    search = find_ffns(tiny_models.export_tiny("mixtral"), names)
    assert search.matches == []
    assert [miss.name for miss in search.misses[:2]] == names
    assert all(miss.reason.startswith("MoE") for miss in search.misses)


def _erf_gelu(g: Handmade, v: ir.Value) -> ir.Value:
    erf = g.op("Erf", g.op("Div", v, g.scalar(math.sqrt(2))))
    return g.op("Mul", g.op("Mul", g.op("Add", g.scalar(1.0), erf), v), g.scalar(0.5))


def _gelu_new(g: Handmade, v: ir.Value) -> ir.Value:
    cube = g.op("Mul", v, g.op("Mul", v, v))
    inner = g.op("Mul", g.op("Add", g.op("Mul", g.scalar(0.044715), cube), v), g.scalar(math.sqrt(2 / math.pi)))
    return g.op("Mul", g.op("Add", g.op("Tanh", inner), g.scalar(1.0)), g.op("Mul", v, g.scalar(0.5)))


def _relu2(g: Handmade, v: ir.Value) -> ir.Value:
    return g.op("Pow", g.op("Relu", v), g.scalar(2.0))


def _quick_gelu(alpha: float) -> Callable[[Handmade, ir.Value], ir.Value]:
    return lambda g, v: g.op("QuickGelu", v, domain="com.microsoft", alpha=alpha)


@pytest.mark.parametrize(
    ("activation", "write"),
    [
        ("silu", lambda g, v: g.op("Mul", g.op("Sigmoid", v), v)),
        ("silu", _quick_gelu(1.0)),
        ("gelu", _erf_gelu),
        ("gelu", lambda g, v: g.op("Gelu", v)),
        ("gelu", lambda g, v: g.op("Gelu", v, domain="com.microsoft")),
        ("gelu_tanh", _gelu_new),
        ("gelu_tanh", lambda g, v: g.op("FastGelu", v, domain="com.microsoft")),
        ("relu2", _relu2),
        ("relu2", lambda g, v: g.op("Mul", (r := g.op("Relu", v)), r)),
        ("relu", lambda g, v: g.op("Max", v, g.scalar(0.0))),
    ],
)
@pytest.mark.parametrize("gated", [True, False])
def test_activations_are_recognised_by_what_they_compute(
    activation: str, write: Callable[[Handmade, ir.Value], ir.Value], gated: bool
) -> None:
    g = Handmade()
    hidden = write(g, g.matmul(g.x, g.weight("a", HIDDEN, WIDTH)))
    if gated:
        hidden = g.op("Mul", g.matmul(g.x, g.weight("b", HIDDEN, WIDTH)), hidden)
    y = g.matmul(hidden, g.weight("c", WIDTH, HIDDEN), module="mlp.down_proj")
    (match,) = find_ffns(g.model(y)).matches
    assert (match.name, match.activation, match.gated) == ("mlp.down_proj", activation, gated)
    assert (match.gate if gated else match.up).value.name == "a"


def test_other_activations_are_refused_by_name() -> None:
    for write in (_quick_gelu(1.702), lambda g, v: g.op("Tanh", v), lambda g, v: g.op("HardSwish", v)):
        g = Handmade()
        hidden = write(g, g.matmul(g.x, g.weight("a", HIDDEN, WIDTH)))
        y = g.matmul(hidden, g.weight("c", WIDTH, HIDDEN), module="mlp.down_proj")
        search = find_ffns(g.model(y))
        (miss,) = search.misses
        assert not search.matches and "activation unknown" in miss.reason


def test_weights_in_every_orientation_read_alike() -> None:
    g = Handmade()
    array = (np.arange(HIDDEN * WIDTH, dtype=np.float32) / 100).reshape(HIDDEN, WIDTH)
    flat = g.op("Reshape", g.x, g.const("rows", np.array([-1, HIDDEN])), shape=["b*s", HIDDEN])
    bias = g.weight("bias", WIDTH)
    ups = [
        g.matmul(g.x, g.const("w0", array)),
        g.matmul(g.x, g.op("Transpose", g.const("w1", array.T.copy()), perm=[1, 0])),
        g.op("FusedMatMul", g.x, g.const("w2", array.T.copy()), domain="com.microsoft", transB=1),
        g.op("Gemm", flat, g.const("w3", array), bias, shape=["b*s", WIDTH]),
        g.op("Add", bias, g.op("Gemm", flat, g.const("w4", array.T.copy()), transB=1, shape=["b*s", WIDTH])),
        g.op("Split", g.matmul(g.x, g.const("w5", np.concatenate([array, array], 1)))),
        g.op("BiasGelu", g.matmul(g.x, g.const("w6", array)), bias, domain="com.microsoft"),
    ]
    g.tape.nodes[-3].attributes["axis"] = ir.AttrInt64("axis", -1)
    outputs = []
    for index, up in enumerate(ups):
        if index == 5:
            outputs.append(g.op("Identity", up))
            continue
        hidden = up if index == 6 else g.op("Relu", up)
        outputs.append(g.matmul(hidden, g.weight(f"d{index}", WIDTH, HIDDEN), module=f"mlp{index}.down"))
    matches = find_ffns(g.model(*outputs)).matches
    assert [match.name for match in matches] == [f"mlp{index}.down" for index in (0, 1, 2, 3, 4, 6)]
    for match in matches:
        np.testing.assert_array_equal(match.up.read(), array)
        assert match.x is g.x
    assert [match.up_bias is not None for match in matches] == [False, False, False, True, True, True]


@pytest.mark.parametrize("spelling", ["Split", "Slice"])
def test_packed_gate_and_up(spelling: str) -> None:
    """Gate and up in one product, with one bias, up first."""
    g = Handmade()
    packed = g.weight("p", HIDDEN, 2 * WIDTH)
    bias = g.weight("b", 2 * WIDTH)
    both = g.op("Add", g.matmul(g.x, packed), bias, shape=["b", "s", 2 * WIDTH])
    if spelling == "Split":
        sizes = g.const("sizes", np.array([WIDTH, WIDTH]))
        up, gate = g.tape.op_multi_out("Split", [both, sizes], {"axis": 2}, num_outputs=2)
    else:
        ends = [g.const(f"end{i}", np.array([end])) for i, end in enumerate((0, WIDTH, 2**63 - 1, -1))]
        up, gate = (g.op("Slice", both, ends[i], ends[i + 1], ends[3]) for i in range(2))
    y = g.matmul(g.op("Mul", g.silu(gate), up), g.weight("d", WIDTH, HIDDEN), module="mlp.down_proj")
    (match,) = find_ffns(g.model(y)).matches
    assert match.gate is not None and match.gate_bias is not None and match.up_bias is not None
    array = packed.const_value.numpy()
    np.testing.assert_array_equal(match.up.read(), array[:, :WIDTH])
    np.testing.assert_array_equal(match.gate.read(), array[:, WIDTH:])
    np.testing.assert_array_equal(match.gate_bias.read(), bias.const_value.numpy()[WIDTH:])


def _second_user() -> ir.Model:
    g = Handmade()
    y = g.swiglu()
    hidden = y.producer().inputs[0]
    return g.model(y, g.op("ReduceMean", hidden))


def _graph_output() -> ir.Model:
    g = Handmade()
    y = g.swiglu()
    return g.model(y, y.producer().inputs[0])


def _variable_up() -> ir.Model:
    g = Handmade()
    up = g.matmul(g.x, g.add_input("w", HIDDEN, WIDTH))
    hidden = g.op("Relu", up)
    return g.model(g.matmul(hidden, g.weight("d", WIDTH, HIDDEN), module="mlp.down_proj"))


def _variable_down() -> ir.Model:
    g = Handmade()
    hidden = g.op("Relu", g.matmul(g.x, g.weight("u", HIDDEN, WIDTH)))
    return g.model(g.matmul(hidden, g.add_input("w", WIDTH, HIDDEN), module="mlp.down_proj"))


def _dequantised() -> ir.Model:
    g = Handmade()
    levels = g.const("q", np.ones((HIDDEN, WIDTH), dtype=np.int8))
    weight = g.op("DequantizeLinear", levels, g.scalar(0.1), shape=[HIDDEN, WIDTH])
    hidden = g.op("Relu", g.matmul(g.x, weight))
    return g.model(g.matmul(hidden, g.weight("d", WIDTH, HIDDEN), module="mlp.down_proj"))


def _four_bits() -> ir.Model:
    g = Handmade()
    hidden = g.op("Relu", g.matmul(g.x, g.weight("u", HIDDEN, WIDTH)))
    packed = g.const("q", np.ones((HIDDEN, 1, WIDTH // 2), dtype=np.uint8))
    scales = g.weight("s", HIDDEN)
    return g.model(g.op("MatMulNBits", hidden, packed, scales, module="mlp.down_proj", domain="com.microsoft"))


def _different_x() -> ir.Model:
    g = Handmade()
    gate = g.silu(g.matmul(g.x, g.weight("g", HIDDEN, WIDTH)))
    up = g.matmul(g.add_input("x2", "b", "s", HIDDEN), g.weight("u", HIDDEN, WIDTH))
    return g.model(g.matmul(g.op("Mul", gate, up), g.weight("d", WIDTH, HIDDEN), module="mlp.down_proj"))


def _expert() -> ir.Model:
    g = Handmade()
    return g.model(g.swiglu("mlp.experts.3"))


def _last_token_only() -> ir.Model:
    g = Handmade()
    return g.model(g.swiglu(x=g.add_input("last", "b", 1, HIDDEN)))


def _scaled_gemm() -> ir.Model:
    g = Handmade()
    flat = g.op("Reshape", g.x, g.const("rows", np.array([-1, HIDDEN])), shape=["b*s", HIDDEN])
    hidden = g.op("Relu", g.op("Gemm", flat, g.weight("u", HIDDEN, WIDTH), alpha=0.5, shape=["b*s", WIDTH]))
    return g.model(g.matmul(hidden, g.weight("d", WIDTH, HIDDEN), module="mlp.down_proj"))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_second_user, "has another user: ReduceMean"),
        (_graph_output, "is an output of the graph"),
        (_variable_up, "weights are not constant: 'w'"),
        (_variable_down, "weights are not constant: 'w'"),
        (_dequantised, "quantised weights behind DequantizeLinear"),
        (_four_bits, "quantised weights in MatMulNBits"),
        (_different_x, "gate and up start from different values"),
        (_expert, "MoE"),
        (_last_token_only, "not the graph's batch and sequence"),
        (_scaled_gemm, "has alpha 0.5"),
    ],
)
def test_refusals_are_reported_unasked(build: Callable[[], ir.Model], reason: str) -> None:
    search = find_ffns(build())
    assert search.matches == []
    (miss,) = search.misses
    assert miss.name.endswith("down_proj") and reason in miss.reason


def _attention(gated: bool) -> ir.Model:
    """Scores, softmax and an output projection; `gated` multiplies by sigmoid(gate(x)) first, as some families do."""
    g = Handmade()
    q, k, v = (g.matmul(g.x, g.weight(name, HIDDEN, HIDDEN), module=f"attn.{name}") for name in ("q", "k", "v"))
    weights = g.op("Softmax", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 2, 1])))
    mixed = g.op("Transpose", g.op("MatMul", weights, v, shape=["b", "s", HIDDEN]), perm=[0, 1, 2])
    if gated:
        mixed = g.op("Mul", mixed, g.op("Sigmoid", g.matmul(g.x, g.weight("g", HIDDEN, HIDDEN))))
    y = g.matmul(mixed, g.weight("o", HIDDEN, HIDDEN), module="attn.o_proj")
    router = g.op("Softmax", g.matmul(y, g.weight("r", HIDDEN, 4), module="mlp.gate"))
    head = g.matmul(g.op("Add", y, g.x), g.weight("h", HIDDEN, 32), module="lm_head")
    return g.model(head, router)


@pytest.mark.parametrize("gated", [False, True])
def test_attention_router_and_head_are_no_ffns(gated: bool) -> None:
    search = find_ffns(_attention(gated))
    assert search.matches == [] and search.misses == []
    (miss,) = find_ffns(_attention(gated), ["attn.o_proj"]).misses
    assert "not of a projection" in miss.reason


def test_a_factorised_projection_is_no_ffn() -> None:
    g = Handmade()
    low = g.matmul(g.x, g.weight("a", HIDDEN, 4), module="q_a")
    search = find_ffns(g.model(g.matmul(low, g.weight("b", 4, HIDDEN), module="q_b")))
    assert search.matches == [] and search.misses == []


@pytest.mark.parametrize("width", [4, HIDDEN])
def test_an_adapter_is_no_ffn(width: int) -> None:
    g = Handmade()
    low = g.op("Relu", g.matmul(g.x, g.weight("a", HIDDEN, width), module="adapter.down"))
    model = g.model(g.op("Add", g.x, g.matmul(low, g.weight("b", width, HIDDEN), module="adapter.up")))
    search = find_ffns(model)
    assert search.matches == [] and search.misses == []
    assert f"it is {width} wide, and its input {HIDDEN}" in find_ffns(model, ["adapter.up"]).misses[0].reason


def test_a_narrow_gated_layer_is_one() -> None:
    """Shared experts of mixtures are often narrower than the model."""
    g = Handmade()
    gate, up = (g.matmul(g.x, g.weight(name, HIDDEN, 8)) for name in ("g", "u"))
    y = g.matmul(g.op("Mul", g.silu(gate), up), g.weight("d", 8, HIDDEN), module="mlp.shared_expert.down_proj")
    (match,) = find_ffns(g.model(y)).matches
    assert match.intermediate_size == 8


def test_expected_names_that_are_not_in_the_graph() -> None:
    g = Handmade()
    search = find_ffns(g.model(g.swiglu()), ["mlp.down_proj", "model.layers.7.mlp.down_proj"])
    assert [match.name for match in search.matches] == ["mlp.down_proj"]
    assert search.misses[0].reason == "no node of the graph carries this module path"


def test_without_metadata_the_weight_names_the_layer() -> None:
    g = Handmade()
    hidden = g.op("Relu", g.matmul(g.x, g.weight("u", HIDDEN, WIDTH)))
    y = g.matmul(hidden, g.weight("layers.0.fc2.weight", WIDTH, HIDDEN))
    assert [match.name for match in find_ffns(g.model(y)).matches] == ["layers.0.fc2"]


@pytest.mark.parametrize(("given", "names"), [("", ["c", "f"]), ("same", ["same", "same.2"])])
def test_layers_whose_nodes_have_no_names_or_one_are_told_apart(given: str, names: list[str]) -> None:
    g = Handmade()
    outputs = []
    for up, gate, down in ("abc", "def"):
        hidden = g.op("Mul", g.silu(g.matmul(g.x, g.weight(gate, HIDDEN, WIDTH))), g.matmul(g.x, g.weight(up, HIDDEN, WIDTH)))
        outputs.append(g.matmul(hidden, g.weight(down, WIDTH, HIDDEN)))
    model = g.model(*outputs)
    for node in model.graph:
        node.name = given
    assert [match.name for match in find_ffns(model).matches] == names


def test_a_layer_in_a_body_of_control_flow_stays_as_it_is() -> None:
    g = Handmade()
    inner = Handmade()
    y = inner.swiglu("inner", x=g.x)
    body = ir.Graph([], [y], nodes=list(inner.tape.nodes), initializers=inner.initializers, name="body")
    flag = ir.Value(name="flag", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    g.inputs.append(flag)
    other = Handmade()
    alternative = ir.Graph([], [z := other.op("Identity", g.x)], nodes=list(other.tape.nodes), name="other")
    z.shape = g.x.shape
    chosen = g.op("If", flag, then_branch=body, else_branch=alternative)
    model = g.model(g.swiglu("outer", x=chosen))
    search = find_ffns(model, expected=["inner.down_proj", "outer.down_proj"])
    assert [match.name for match in search.matches] == ["outer.down_proj"]
    (miss,) = search.misses
    assert miss.name == "inner.down_proj"
    assert "in a body of control flow (the then_branch of If" in miss.reason
