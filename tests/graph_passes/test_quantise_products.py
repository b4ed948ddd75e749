"""Products of handmade graphs as QuantMatMul nodes: what they compute, what stays, and what becomes of the weights."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from handmade import FEEDS, Handmade, run

from graph_passes.quant.layout import QuantisedMatrix, unpack
from graph_passes.quant.op import ContractError, QuantMatMulAttributes
from graph_passes.quant.quantise import quantise
from graph_passes.quant.quantiser import QuantFormat, UniformQuantiser
from graph_passes.quant_matmul import QuantiseProducts

K, N = 64, 40


class Graph(Handmade):
    """With an input `wide` [b, s, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = self.add_input("wide", "b", "s", K)


def feed() -> np.ndarray:
    return np.random.default_rng(4).standard_normal((2, 3, K)).astype(np.float32)


def run_bodies(model: ir.Model, **more: np.ndarray) -> dict[str, np.ndarray]:
    """In ONNX Runtime without our library; `onnx.reference` knows no overloads."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {**FEEDS, "wide": feed(), **more}
    names = {each.name for each in session.get_inputs()}
    found = session.run(None, {name: value for name, value in feeds.items() if name in names})
    return dict(zip((each.name for each in session.get_outputs()), found, strict=True))


def uniform(bits: int, **settings: bool) -> UniformQuantiser:
    return UniformQuantiser(QuantFormat(bits, settings.pop("has_offset", False)), **settings)


def compare(graph_of: object, quantiser: UniformQuantiser, **settings: object) -> tuple[ir.Model, QuantiseProducts]:
    """Quantise the graph that `graph_of()` gives; what it computes is near to what it did, in 8 bits."""
    before, model = graph_of(), graph_of()  # type: ignore[operator]
    passed = QuantiseProducts(quantiser, **settings)  # type: ignore[arg-type]
    passed(model)
    wanted, found = run(before, wide=feed()), run_bodies(model)
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        assert np.linalg.norm(found[name] - value) <= 0.02 * np.linalg.norm(value)
    return model, passed


def products() -> ir.Model:
    g = Graph()
    q = g.op("Add", g.matmul(g.wide, g.weight("q", K, N), "attn.q_proj"), g.weight("q.bias", N), shape=["b", "s", N])
    k = g.matmul(g.wide, g.op("Transpose", g.weight("k", N, K), perm=[1, 0], shape=[K, N]), "attn.k_proj")
    return g.model(q, k, g.matmul(g.wide, g.weight("odd", K, 1), "gate"))


@pytest.mark.parametrize("quantiser", [uniform(8), uniform(8, has_offset=True, search=True), uniform(8, search=True)])
def test_all_products(quantiser: UniformQuantiser) -> None:
    model, passed = compare(products, quantiser)
    nodes = [node for node in model.graph if node.op_type == "QuantMatMul"]
    assert [node.name for node in nodes] == ["attn.q_proj", "attn.k_proj", "gate"]
    assert [len(node.inputs) for node in nodes] == [3, 2, 2], "the bias is the node's"
    assert not any(node.op_type in ("MatMul", "Add", "Transpose") for node in model.graph)
    assert {"q", "k", "odd", "q.bias"}.isdisjoint(model.graph.initializers)
    (q, *_), kept = passed.report.products, passed.report.kept
    assert kept == [] and (q.in_features, q.out_features, q.bits, q.bytes_before) == (K, N, 8, K * N * 4)
    assert q.bytes_after == 2 * 2 * (1024 + 64 * (1 + quantiser.format.has_offset))
    assert not QuantiseProducts(quantiser)(model).modified, "a second run finds nothing"


def test_by_name() -> None:
    model, passed = compare(products, uniform(8), names=["attn.k_proj", "attn.x_proj"])
    assert [product.name for product in passed.report.products] == ["attn.k_proj"]
    assert [(each.name, each.reason) for each in passed.report.kept] == [
        ("attn.x_proj", "the graph has no product of this name")
    ]
    assert sum(node.op_type == "MatMul" for node in model.graph) == 2 and "q" in model.graph.initializers


def test_one_function_a_variant() -> None:
    model, _ = compare(products, uniform(8))
    assert {key[2] for key in model.functions} == {"", "bits8"}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_a_weight_is_packed_once_and_kept_where_it_is_read_otherwise() -> None:
    def tied() -> ir.Model:
        g = Graph()
        shared = g.weight("shared", K, N)
        rows = g.op("Gather", shared, g.inputs[0], shape=["b", "s", N])
        return g.model(g.matmul(g.wide, shared, "one"), g.matmul(g.wide, shared, "two"), rows)

    model, passed = compare(tied, uniform(8))
    assert "shared" in model.graph.initializers
    assert [product.shares_with for product in passed.report.products] == [None, "one"]
    assert passed.report.products[1].bytes_after == 0
    assert sum(name.endswith(".quant_weight") for name in model.graph.initializers) == 1


def test_gemm_with_a_bias_of_its_own() -> None:
    def gemm() -> ir.Model:
        g = Graph()
        flat = g.op("Reshape", g.wide, g.const("flat", np.array([-1, K])), shape=["r", K])
        return g.model(g.op("Gemm", flat, g.weight("w", N, K), g.weight("b", N), transB=1, shape=["r", N], module="head"))

    model, passed = compare(gemm, uniform(8))
    assert [product.name for product in passed.report.products] == ["head"]
    assert [len(node.inputs) for node in model.graph if node.op_type == "QuantMatMul"] == [3]


class ByName(UniformQuantiser):
    """The head has 8 bits, and one product stays."""

    def form(self, name: str) -> QuantFormat:
        return {"attn.q_proj": QuantFormat(8), "attn.k_proj": None}.get(name, self.format)  # type: ignore[return-value]

    def matrix(self, name: str, weight: np.ndarray) -> QuantisedMatrix:
        return quantise(weight, self.form(name).bits)


def test_each_product_has_its_form() -> None:
    model, passed = products(), QuantiseProducts(ByName(QuantFormat(6)))
    passed(model)
    assert [(each.name, each.bits) for each in passed.report.products] == [("attn.q_proj", 8), ("gate", 6)]
    assert [(each.name, each.reason) for each in passed.report.kept] == [("attn.k_proj", "the quantiser leaves it as it is")]
    assert [node.attributes["bits"].value for node in model.graph if node.op_type == "QuantMatMul"] == [8, 6]


def test_products_in_other_forms_do_not_share_a_weight() -> None:
    def tied() -> ir.Model:
        g = Graph()
        shared = g.weight("shared", K, N)
        return g.model(g.matmul(g.wide, shared, "attn.q_proj"), g.matmul(g.wide, shared, "gate"))

    passed = QuantiseProducts(ByName(QuantFormat(6)))
    passed(tied())
    assert [(each.bits, each.shares_with) for each in passed.report.products] == [(8, None), (6, None)]


def test_a_quantiser_that_does_not_keep_its_word_is_named() -> None:
    class Other(UniformQuantiser):
        def matrix(self, name: str, weight: np.ndarray) -> QuantisedMatrix:
            return quantise(weight, 5)

    model = products()
    QuantiseProducts(Other(QuantFormat(8)))(model)
    packed = model.graph.initializers["attn.q_proj.quant_weight"].const_value
    assert packed is not None
    with pytest.raises(ContractError, match=r"'attn.q_proj': the quantiser gave .*bits=5.*wanted .*bits=8"):
        packed.numpy()


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_a_table_shares_the_records_of_the_head(bits: int) -> None:
    class Tables(UniformQuantiser):
        def matrix(self, name: str, weight: np.ndarray) -> QuantisedMatrix:
            found = super().matrix(name, weight)
            found.scale[3, 0], found.scale[3, 1] = 3e-7, -65504  # subnormal, and the largest
            return found

    g = Graph()
    table = g.const("table", np.random.default_rng(1).standard_normal((N, K)).astype(np.float32))
    rows = g.op("Gather", table, g.inputs[0], shape=["b", "s", K], module="embed")
    head = g.op("MatMul", g.wide, g.op("Transpose", table, perm=[1, 0], shape=[K, N]), shape=["b", "s", N], module="head")
    model = g.model(rows, head)
    passed = QuantiseProducts(Tables(QuantFormat(bits)))
    passed(model)
    assert [(each.name, each.shares_with) for each in passed.report.products] == [("head", None), ("embed:table", "head")]
    assert "table" not in model.graph.initializers
    packed = model.graph.initializers["head.quant_weight"].const_value
    assert packed is not None
    wanted = unpack(packed.numpy(), QuantMatMulAttributes(N, bits)).dequantise()
    ids = np.array([[0, 3, 31], [32, 39, 17]])
    found = next(value for value in run_bodies(model, input_ids=ids).values() if value.shape[-1] == K)
    np.testing.assert_array_equal(found, wanted[ids])


def test_a_table_that_the_quantiser_does_not_know_stays() -> None:
    class Products(UniformQuantiser):
        def form(self, name: str) -> QuantFormat:
            return None if name.endswith(":table") else self.format  # type: ignore[return-value]

    g = Graph()
    rows = g.op("Gather", g.const("table", np.ones((N, K), np.float32)), g.inputs[0], shape=["b", "s", K], module="places")
    model = g.model(rows)
    assert not QuantiseProducts(Products(QuantFormat(8)))(model).modified
    assert [node.op_type for node in model.graph] == ["Gather"]


def test_what_stays_and_why() -> None:
    g = Graph()
    results = [
        g.matmul(g.x, g.weight("narrow", 16, N), "narrow"),
        g.op("MatMul", g.wide, g.op("Transpose", g.wide, perm=[0, 2, 1]), module="scores", shape=["b", "s", "s"]),
    ]
    half = g.op("Cast", g.wide, to=int(ir.DataType.FLOAT16), shape=["b", "s", K])
    half.type = ir.TensorType(ir.DataType.FLOAT16)
    narrow = g.matmul(half, g.const("half", np.ones((K, N), np.float16)), "half")
    narrow.type = ir.TensorType(ir.DataType.FLOAT16)
    model = g.model(*results, narrow)
    passed = QuantiseProducts(uniform(4))
    before = ir.to_proto(model).SerializeToString()
    assert not passed(model).modified and ir.to_proto(model).SerializeToString() == before
    reasons = {each.name: each.reason for each in passed.report.kept}
    assert "16 rows; wanted a multiple of 32" in reasons["narrow"]
    assert "not constant" in reasons["scores"]
    assert "x has type FLOAT16; wanted FLOAT" in reasons["half"]
    assert passed.report.products == []


def test_a_sum_that_is_read_twice_keeps_its_add() -> None:
    def twice() -> ir.Model:
        g = Graph()
        product = g.matmul(g.wide, g.weight("q", K, N), "q_proj")
        return g.model(g.op("Add", product, g.weight("b", N), shape=["b", "s", N]), g.op("Neg", product, shape=["b", "s", N]))

    model, _ = compare(twice, uniform(8))
    assert [node.op_type for node in model.graph] == ["QuantMatMul", "Add", "Neg"]


def test_nothing_is_read_before_it_is_written() -> None:
    read = []

    def lazy() -> ir.TensorProtocol:
        read.append(1)
        return ir.Tensor(np.ones((K, N), np.float32), name="w")

    g = Graph()
    w = g.weight("w", K, N)
    model = g.model(g.matmul(g.wide, w, "q_proj"))
    w.const_value = ir.LazyTensor(lazy, dtype=ir.DataType.FLOAT, shape=ir.Shape((K, N)), name="w")
    QuantiseProducts(uniform(4))(model)
    assert read == []
    packed = next(value for name, value in model.graph.initializers.items() if name.endswith(".quant_weight"))
    assert packed.const_value is not None
    matrix = unpack(packed.const_value.numpy(), QuantMatMulAttributes(N, 4))
    assert read == [1]
    np.testing.assert_allclose(matrix.dequantise(), np.ones((N, K)), rtol=1e-3)


def test_a_weight_that_is_not_finite_is_named() -> None:
    g = Graph()
    weight = np.ones((K, N), np.float32)
    weight[7, 3] = np.inf
    model = g.model(g.matmul(g.wide, g.const("w", weight), "q_proj"))
    QuantiseProducts(uniform(4))(model)
    packed = model.graph.initializers["q_proj.quant_weight"].const_value
    assert packed is not None
    with pytest.raises(ContractError, match=r"'q_proj'.*row 3, column 7 is inf"):
        packed.numpy()


def test_bad_bits_and_an_old_opset_are_refused() -> None:
    with pytest.raises(ContractError, match="'bits' is 3; allowed: 4, 5, 6, 8"):
        QuantFormat(3)
    model = products()
    model.graph.opset_imports[""] = 17
    with pytest.raises(ir.passes.PreconditionError, match="opset 17; QuantMatMul needs 18"):
        QuantiseProducts(uniform(8))(model)
