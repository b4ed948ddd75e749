"""The graph's own log-sum-exp and entropy: those of NumPy in float64, for random and for extreme logits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graph_passes.load_outputs import ENTROPY, LOAD_OUTPUTS, LOG_SUM_EXP, AddLoadOutputs
from graph_passes.naming import name_interface
from tests import tiny_models

WIDTH = 32


def graph_of_logits(dtype: ir.DataType = ir.DataType.FLOAT, opset: int = 20, axes: int = 3) -> ir.Model:
    """logits = z: what comes in goes out."""
    sizes = ["batch_size", "sequence_length", WIDTH][:axes]
    z = ir.Value(name="z", type=ir.TensorType(dtype), shape=ir.Shape(sizes))
    node = ir.node("Identity", [z], name="copy")
    logits = node.outputs[0]
    logits.name, logits.type, logits.shape = "logits", ir.TensorType(dtype), ir.Shape(sizes)
    return ir.Model(ir.Graph([z], [logits], nodes=[node], opset_imports={"": opset}, name="logits"), ir_version=10)


@pytest.fixture(scope="module")
def run() -> object:
    model = graph_of_logits()
    assert AddLoadOutputs()(model).modified
    session = tiny_models.session(model)
    return lambda z: session.run(list(LOAD_OUTPUTS), {"z": z})


def reference(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of z [B, V], in float64."""
    wide = z.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    log_p = wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))
    return (wide - log_p)[:, 0], -(np.exp(log_p) * log_p).sum(-1)


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 4), st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
def test_last_position_of_random_logits(run: object, seed: int, batch: int, length: int, scale: float) -> None:
    z = (np.random.default_rng(seed).normal(size=(batch, length, WIDTH)) * scale).astype(np.float32)
    log_sum_exp, entropy = run(z)  # type: ignore[operator]
    assert log_sum_exp.shape == entropy.shape == (batch,)
    assert log_sum_exp.dtype == entropy.dtype == np.float32
    wanted = reference(z[:, -1])
    np.testing.assert_allclose(log_sum_exp, wanted[0], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(entropy, wanted[1], rtol=1e-5, atol=1e-5)
    assert (entropy >= 0).all()


def test_extreme_logits(run: object) -> None:
    rows = np.zeros((6, 1, WIDTH), np.float32)
    rows[1, 0, 3] = 1e4  # certain
    rows[2] = 3e38  # uniform, and exp would overflow
    rows[3] = -3e38  # uniform, and exp would underflow
    rows[4, 0, :2] = 500.0  # two equal
    rows[5, 0] = np.linspace(-1e5, 1e5, WIDTH)
    log_sum_exp, entropy = run(rows)  # type: ignore[operator]
    uniform = np.log(WIDTH)
    np.testing.assert_allclose(entropy, [uniform, 0, uniform, uniform, np.log(2), 0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(log_sum_exp, [uniform, 1e4, 3e38, -3e38, 500 + np.log(2), 1e5], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_makes_the_entropy_nan(run: object, bad: float) -> None:
    z = np.zeros((2, 2, WIDTH), np.float32)
    z[0, 1, 5] = bad
    z[1, 0, 5] = bad  # not the last position
    _, entropy = run(z)  # type: ignore[operator]
    assert np.isnan(entropy[0]) and entropy[1] == pytest.approx(np.log(WIDTH))


def test_float16_logits_are_widened_first() -> None:
    model = graph_of_logits(ir.DataType.FLOAT16)
    AddLoadOutputs()(model)
    assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.FLOAT]
    z = (np.random.default_rng(1).normal(size=(2, 3, WIDTH)) * 20).astype(np.float16)
    found = tiny_models.session(model).run(list(LOAD_OUTPUTS), {"z": z})
    for values, wanted in zip(found, reference(z[:, -1]), strict=True):
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-5)


def test_a_model_keeps_its_other_outputs_and_a_second_run_does_nothing() -> None:
    model = tiny_models.export_tiny("llama", fusions="cpu")
    name_interface(model)
    before = [value.name for value in model.graph.outputs]
    assert AddLoadOutputs()(model).modified
    assert [value.name for value in model.graph.outputs] == [*before, LOG_SUM_EXP, ENTROPY]
    for value in model.graph.outputs[-2:]:
        assert value.dtype == ir.DataType.FLOAT and value.shape == ir.Shape(["batch_size"])
    assert not AddLoadOutputs()(model).modified
    ids = np.random.default_rng(0).integers(3, 256, (2, 5))
    feeds = tiny_models.prompt_feeds(model.graph.inputs, ids)
    logits, *found = tiny_models.session(model).run(["logits", *LOAD_OUTPUTS], feeds)
    for values, wanted in zip(found, reference(logits[:, -1]), strict=True):
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("change", "said"), [({"axes": 2}, "three axes"), ({"opset": 17}, "opset 17")])
def test_graphs_that_it_refuses(change: dict[str, int], said: str) -> None:
    with pytest.raises(ir.passes.PreconditionError, match=said):
        AddLoadOutputs()(graph_of_logits(**change))  # type: ignore[arg-type]
