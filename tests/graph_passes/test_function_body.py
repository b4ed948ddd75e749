"""The function body computes what the reference computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import node_models
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clada_export.op.reference import SparseFFNResult, SparseFFNTensors, quantize_shadow, sparse_ffn
from graph_passes.function_body import make_function, variant_name
from graph_passes.op import ACTIVATIONS, RULES, SCORES, STAT_NORMS, ContractError, SparseFFNAttributes

INF = float("inf")


@st.composite
def attribute_sets(draw: st.DrawFn) -> SparseFFNAttributes:
    score = draw(st.sampled_from(SCORES))
    use_stat = score == "prefix" or draw(st.booleans())
    slowest = draw(st.sampled_from([0.25, 0.5, 1.0]))
    return SparseFFNAttributes(
        activation=draw(st.sampled_from(ACTIVATIONS)),
        gated=draw(st.booleans()),
        score=score,
        rule=draw(st.sampled_from(RULES)),
        granule=draw(st.sampled_from([1, 2, 4])),
        combine=draw(st.sampled_from(["sum", "weighted"])) if score == "external" else "sum",
        load_slope=draw(st.sampled_from([0.0, 0.3, -0.5])),
        load_min=slowest,
        load_max=draw(st.sampled_from([1.0, 3.0])),
        use_stat=use_stat,
        backbone_min=draw(st.sampled_from([0.0, 0.6])) if use_stat else 0.0,
        prior_gamma=draw(st.sampled_from([0.0, 0.7])) if use_stat else 0.0,
        emit_stat=draw(st.booleans()),
        stat_norm=draw(st.sampled_from(STAT_NORMS)),
        emit_active=draw(st.booleans()),
        has_bias=draw(st.booleans()),
    )


def make_feeds(attributes: SparseFFNAttributes, rows: tuple[int, ...], neurons: int, seed: int) -> dict[str, np.ndarray]:
    """Random inputs: `rows` are the leading axes of x."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    d, n, granules = 32, 2 if attributes.gated else 1, neurons // attributes.granule
    w_in = normal(neurons, n, d) / 4
    shadow, shadow_scale = quantize_shadow(torch.from_numpy(w_in))
    loads = np.array([0.0, 1.0, -2.0, 0.5, 4.0, INF, -INF, np.nan], dtype=np.float32)
    threshold = np.abs(normal(granules if rng.random() < 0.5 and attributes.rule != "topk" else 1))
    if attributes.rule == "topk":
        threshold = np.array([granules * rng.random()], dtype=np.float32)
    by_sequence = len(rows) == 2 and rng.random() < 0.5
    past = np.abs(normal(rows[0], neurons))
    past[: rng.integers(0, 2)] = 0.0
    return {
        "x": normal(*rows, d),
        "load": rng.choice(loads, rows),
        "w_in": w_in,
        "w_out": normal(neurons, d),
        "threshold": threshold,
        "neuron_scale": np.abs(normal(neurons)),
        "shadow": shadow.numpy(),
        "shadow_scale": shadow_scale.numpy(),
        "score": np.abs(normal(rows[0], granules) if by_sequence else normal(*rows, granules)),
        "past_stat": past,
        "gate_bias": normal(neurons),
        "up_bias": normal(neurons),
        "down_bias": normal(d),
    }


def reference(attributes: SparseFFNAttributes, feeds: dict[str, np.ndarray], scale: float = 1.0) -> SparseFFNResult:
    tensors: dict[str, Any] = {
        name: torch.from_numpy(feeds[name].astype(np.float32) if feeds[name].dtype == ml_dtypes.bfloat16 else feeds[name])
        for name in ("w_in", "w_out", "threshold", "neuron_scale", "shadow", "shadow_scale")
    }
    if attributes.has_bias:
        tensors |= {name: torch.from_numpy(feeds[name]) for name in ("gate_bias", "up_bias", "down_bias")}
    tensors["threshold"] = tensors["threshold"] * scale
    return sparse_ffn(
        torch.from_numpy(feeds["x"]),
        torch.from_numpy(feeds["load"]),
        SparseFFNTensors(**tensors),
        attributes,
        score=torch.from_numpy(feeds["score"]) if attributes.score == "external" else None,
        past_stat=torch.from_numpy(feeds["past_stat"]) if attributes.use_stat else None,
    )


def compare(found: dict[str, Any], wanted: SparseFFNResult, attributes: SparseFFNAttributes) -> None:
    np.testing.assert_allclose(found["y"], wanted.y.numpy(), rtol=1e-4, atol=1e-4)
    if attributes.emit_active:
        np.testing.assert_array_equal(found["active"], wanted.active.numpy())
    if attributes.emit_stat:
        assert wanted.stat is not None
        np.testing.assert_allclose(found["stat"], wanted.stat.numpy(), rtol=1e-4, atol=1e-5)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    attributes=attribute_sets(),
    rows=st.sampled_from([(1, 1), (2, 3), (3, 1), (5,), (2, 1, 2)]),
    neurons=st.sampled_from([4, 16, 20]),
    seed=st.integers(0, 2**16),
)
def test_equals_the_reference(attributes: SparseFFNAttributes, rows: tuple[int, ...], neurons: int, seed: int) -> None:
    if attributes.use_stat or attributes.emit_stat:
        assume(len(rows) == 2)
    feeds = make_feeds(attributes, rows, neurons, seed)
    wanted = reference(attributes, feeds)
    # A score within rounding of its threshold may fall on either side.
    for scale in (1 - 1e-4, 1 + 1e-4):
        assume(bool((reference(attributes, feeds, scale).mask == wanted.mask).all()))
    model = node_models.node_model(attributes, feeds)
    node_models.check(model)
    compare(node_models.run_onnxruntime(model, feeds), wanted, attributes)
    compare(node_models.run_reference_evaluator(model, feeds), wanted, attributes)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("special", [np.nan, INF, 0.0])
def test_special_scores(rule: str, special: float) -> None:
    attributes = SparseFFNAttributes(score="external", rule=rule, granule=2, emit_active=True, load_slope=0.5)
    feeds = make_feeds(attributes, (2, 4), 16, seed=3)
    feeds["score"] = np.ones((2, 4, 8), dtype=np.float32)
    feeds["score"][0, :, 2:5] = special
    feeds["score"][1] = special
    feeds["threshold"] = np.array([3.0 if rule == "topk" else 0.7], dtype=np.float32)
    feeds["load"] = np.array([[0.0, 1.0, -1.0, INF], [0.0, 1.0, -INF, np.nan]], dtype=np.float32)
    model = node_models.node_model(attributes, feeds)
    wanted = reference(attributes, feeds)
    compare(node_models.run_onnxruntime(model, feeds), wanted, attributes)
    compare(node_models.run_reference_evaluator(model, feeds), wanted, attributes)


def test_masked_infinities_are_removed() -> None:
    attributes = SparseFFNAttributes(activation="relu", gated=False, score="external", rule="topk", emit_active=True)
    feeds = make_feeds(attributes, (1, 2), 8, seed=0)
    feeds["w_in"][3] = 1e38
    feeds["x"][:] = 10.0
    feeds["score"] = np.arange(8, 0, -1, dtype=np.float32).reshape(1, 8)
    feeds["threshold"], feeds["load"] = np.array([2.0], dtype=np.float32), np.zeros((1, 2), dtype=np.float32)
    found = node_models.run_onnxruntime(node_models.node_model(attributes, feeds), feeds)
    assert np.isfinite(found["y"]).all()
    compare(found, reference(attributes, feeds), attributes)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_weights_are_cast(dtype: Any) -> None:
    attributes = SparseFFNAttributes(score="exact", has_bias=True, emit_active=True)
    feeds = make_feeds(attributes, (2, 3), 16, seed=1)
    feeds |= {name: feeds[name].astype(dtype) for name in ("w_in", "w_out")}
    model = node_models.node_model(attributes, feeds)
    node_models.check(model)
    # Graph inputs of bfloat16 cannot be fed from NumPy: make them constants.
    for name in ("w_in", "w_out"):
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.Tensor(feeds[name], name=name)
        model.graph.register_initializer(value)
    compare(node_models.run_onnxruntime(model, feeds), reference(attributes, feeds), attributes)


def test_narrow_x_gives_narrow_y() -> None:
    attributes = SparseFFNAttributes(score="exact", emit_active=True)
    feeds = make_feeds(attributes, (2, 3), 16, seed=2)
    feeds |= {name: feeds[name].astype(np.float16) for name in ("x", "w_in", "w_out")}
    model = node_models.node_model(attributes, feeds)
    node_models.check(model)
    # The sums are float32, and y is rounded once: half an ulp of float16.
    wanted = reference(attributes, feeds | {"x": feeds["x"].astype(np.float32)}).y.numpy()
    for run in (node_models.run_onnxruntime, node_models.run_reference_evaluator):
        found = run(model, feeds)
        assert found["y"].dtype == np.float16
        np.testing.assert_allclose(found["y"].astype(np.float32), wanted, rtol=2**-11 + 1e-4, atol=1e-4)


def test_no_value_changes_its_type_without_a_cast() -> None:
    """The schemas of the standard operators, which allow no mixed types, are kept; float32 inputs have no Cast."""
    variants = [{"score": score, "rule": rule} for score in SCORES for rule in RULES]
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        for variant in variants:
            attributes = SparseFFNAttributes(
                **variant, granule=2, has_bias=True, emit_active=True, emit_stat=True, use_stat=True, prior_gamma=0.5
            )
            feeds = make_feeds(attributes, (2, 3), 16, seed=0)
            feeds |= {name: feeds[name].astype(dtype) for name in ("x", "w_in", "w_out")}
            model = node_models.node_model(attributes, feeds)
            node_models.check(model)
            (function,) = model.functions.values()
            casts = {node.inputs[0].name for node in function if node.op_type == "Cast" and node.inputs[0] is not None}
            assert casts & {"x", "w_in", "w_out"} == (set() if dtype == np.float32 else {"x", "w_in", "w_out"})
            assert not any(node.op_type == "CastLike" for node in function)


def test_types_that_do_not_go_together_are_refused() -> None:
    half, bfloat = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
    for x_type, weight_type in ((half, bfloat), (half, ir.DataType.FLOAT), (ir.DataType.DOUBLE, half)):
        with pytest.raises(ContractError, match="x has type"):
            make_function(SparseFFNAttributes(), x_type=x_type, weight_type=weight_type)


def test_shape_inference_sees_the_outputs() -> None:
    attributes = SparseFFNAttributes(score="shadow", rule="topk", granule=4, emit_active=True, emit_stat=True, use_stat=True)
    feeds = make_feeds(attributes, (2, 3), 16, seed=0)
    model = node_models.node_model(attributes, feeds)
    for output in model.graph.outputs:
        output.shape = None
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model))
    shapes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in inferred.graph.output
    }
    assert len(shapes["y"]) == 3 and len(shapes["active"]) == 2 and shapes["stat"] == [2, 16]


def test_one_function_serves_layers_that_differ_in_numbers() -> None:
    first = SparseFFNAttributes(load_slope=0.1, load_min=0.5, load_max=2.0)
    second = replace(first, load_slope=0.3, load_min=0.2, load_max=3.0)
    assert ir.to_proto(make_function(first)) == ir.to_proto(make_function(second))


def test_the_norm_of_the_statistic_is_part_of_the_variant() -> None:
    rows, magnitudes = (SparseFFNAttributes(emit_stat=True, stat_norm=norm) for norm in STAT_NORMS)
    assert variant_name(rows) != variant_name(magnitudes)
    assert ir.to_proto(make_function(rows)) != ir.to_proto(make_function(magnitudes))
    # Without the output there is nothing that it changes.
    rows, magnitudes = (replace(each, emit_stat=False) for each in (rows, magnitudes))
    assert ir.to_proto(make_function(rows)) == ir.to_proto(make_function(magnitudes))


@pytest.mark.parametrize("opset", [18, 19, 21, 22])
def test_other_opsets(opset: int) -> None:
    attributes = SparseFFNAttributes(score="shadow", rule="topk", granule=2, use_stat=True, emit_stat=True, emit_active=True)
    feeds = make_feeds(attributes, (2, 3), 16, seed=5)
    model = node_models.node_model(attributes, feeds, opset=opset)
    node_models.check(model)
    compare(node_models.run_onnxruntime(model, feeds), reference(attributes, feeds), attributes)


def test_old_opsets_are_refused() -> None:
    with pytest.raises(ValueError, match="opset 18 or later"):
        make_function(SparseFFNAttributes(), opset=17)
