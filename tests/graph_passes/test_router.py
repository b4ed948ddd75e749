"""The emitted nodes of a router, run in ONNX Runtime, give what `RouterModule` gives."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clada_export.op.router import RouterModule
from graph_passes.op import ContractError
from graph_passes.router import HIDDEN_ACTIVATIONS, OUTPUTS, Router
from graph_passes.router_nodes import emit_router
from tests.tiny_models import session

HIDDEN, WIDTH, GRANULES = 12, 7, 5


def random_router(seed: int, layers: int = 2, biased: bool = True, **settings: Any) -> Router:
    rng = np.random.default_rng(seed)
    widths = [HIDDEN, *[WIDTH] * (layers - 1), GRANULES]
    weights = tuple(rng.normal(size=(widths[i + 1], widths[i])).astype(np.float32) for i in range(layers))
    biases = tuple(rng.normal(size=len(weight)).astype(np.float32) if biased else None for weight in weights)
    return Router(weights, biases, **settings)


def run_nodes(routers: list[Router], x: np.ndarray, load: np.ndarray) -> list[np.ndarray]:
    """The scores of routers that sit in one graph and read the same x and load; leading axes of any length."""
    axes: list[int | str] = [f"axis_{i}" for i in range(load.ndim)]
    x_value = ir.Value(name="x", type=ir.TensorType(ir.DataType.from_numpy(x.dtype)), shape=ir.Shape([*axes, x.shape[-1]]))
    load_value = ir.Value(name="load", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(axes))
    constants: dict[str, ir.Value] = {}

    def initializer(name: str, array: np.ndarray) -> ir.Value:
        return constants.setdefault(name, ir.Value(name=name, const_value=ir.Tensor(array, name=name)))

    nodes, outputs = [], []
    for index, router in enumerate(routers):
        made, score = emit_router(router, x_value, load_value, f"layer_{index}.router", initializer)
        nodes += made
        score.type, score.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([*axes, router.granules])
        outputs.append(score)
    graph = ir.Graph(
        [x_value, load_value],
        outputs,
        nodes=nodes,
        initializers=tuple(constants.values()),
        opset_imports={"": 20},
        name="router",
    )
    return list(session(ir.Model(graph, ir_version=10)).run(None, {"x": x, "load": load}))


def rows(seed: int, *shape: int) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(*shape, HIDDEN)) * 3).astype(np.float32)


@pytest.mark.parametrize(("hidden", "output"), list(product(HIDDEN_ACTIVATIONS, OUTPUTS)))
def test_nodes_match_the_module(hidden: str, output: str) -> None:
    k = 2 if output == "topk_softmax" else None
    router = random_router(1, hidden=hidden, output=output, scale=2.5, k=k)
    x = rows(2, 4, 3)
    found = run_nodes([router], x, np.zeros((4, 3), dtype=np.float32))[0]
    wanted = RouterModule(router)(torch.from_numpy(x)).numpy()
    assert found.dtype == np.float32 and found.shape == (4, 3, GRANULES)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert found.min() >= 0.0
    assert len(np.unique(found.round(4))) > 10  # a router that gives the same everywhere would pass the comparison


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    layers=st.integers(1, 3),
    biased=st.booleans(),
    normalise=st.booleans(),
    shape=st.sampled_from([(1,), (6,), (2, 3), (1, 1), (2, 1, 2)]),
    scale=st.sampled_from([1.0, 0.125, 48.0]),
)
def test_any_depth_and_any_leading_axes(
    seed: int, layers: int, biased: bool, normalise: bool, shape: tuple[int, ...], scale: float
) -> None:
    router = random_router(seed, layers, biased, hidden="tanh", output="softmax", normalise=normalise, scale=scale)
    x = rows(seed, *shape)
    found = run_nodes([router], x, np.zeros(shape, dtype=np.float32))[0]
    np.testing.assert_allclose(found, RouterModule(router)(torch.from_numpy(x)).numpy(), rtol=2e-5, atol=1e-6 * scale)
    np.testing.assert_allclose(found.sum(-1), scale, rtol=1e-5)


def test_dense_rows_have_score_one() -> None:
    router = random_router(3, hidden="relu", output="abs", scale=7.0)
    x = rows(4, 6)
    load = np.array([0.0, np.inf, np.nan, -np.inf, 2.0, -4.0], dtype=np.float32)
    found = run_nodes([router], x, load)[0]
    wanted = RouterModule(router)(torch.from_numpy(x)).numpy()
    assert (found[[1, 2]] == 1.0).all()
    np.testing.assert_allclose(found[[0, 3, 4, 5]], wanted[[0, 3, 4, 5]], rtol=1e-5)
    assert not np.isclose(wanted[[1, 2]], 1.0).any()


def test_dense_rows_have_score_one_whatever_x_is() -> None:
    x = rows(5, 2)
    x[0, 0], x[1, 3] = np.nan, np.inf
    found = run_nodes([random_router(5)], x, np.full(2, np.inf, dtype=np.float32))[0]
    assert (found == 1.0).all()


@pytest.mark.parametrize("normalise", [False, True])
def test_float16_rows_are_computed_in_float32(normalise: bool) -> None:
    router = random_router(6, hidden="tanh", normalise=normalise)
    # The squares of these overflow float16, and so would the sum of products.
    x = (rows(7, 5) * 400).astype(np.float16)
    found = run_nodes([router], x, np.zeros(5, dtype=np.float32))[0]
    wanted = RouterModule(router)(torch.from_numpy(x)).numpy()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_row_of_zeros_is_no_division_by_zero() -> None:
    router = random_router(8, normalise=True)
    x = np.zeros((2, HIDDEN), dtype=np.float32)
    x[1] = 1.0
    found = run_nodes([router], x, np.zeros(2, dtype=np.float32))[0]
    np.testing.assert_allclose(found, RouterModule(router)(torch.from_numpy(x)).numpy(), rtol=1e-5)
    assert np.isfinite(found).all()


def test_normalised_scores_do_not_depend_on_the_size_of_x() -> None:
    router = random_router(9, normalise=True)
    x = rows(10, 3)
    load = np.zeros(3, dtype=np.float32)
    np.testing.assert_allclose(run_nodes([router], x, load)[0], run_nodes([router], x * 50, load)[0], rtol=1e-4)


def test_two_routers_share_a_graph() -> None:
    routers = [random_router(11), random_router(12, 1, output="softmax", scale=5.0)]
    x = rows(13, 4)
    found = run_nodes(routers, x, np.zeros(4, dtype=np.float32))
    for scores, router in zip(found, routers, strict=True):
        np.testing.assert_allclose(scores, RouterModule(router)(torch.from_numpy(x)).numpy(), rtol=1e-5, atol=1e-6)


def test_sizes() -> None:
    router = random_router(14)
    assert (router.hidden_size, router.granules) == (HIDDEN, GRANULES)
    assert router.parameters == WIDTH * HIDDEN + WIDTH + GRANULES * WIDTH + GRANULES


W = np.ones((GRANULES, HIDDEN), dtype=np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": (W,), "biases": (None,), "output": "exp"}, "output is 'exp'"),
        ({"weights": (W,), "biases": (None,), "hidden": "gelu"}, "hidden is 'gelu'"),
        ({"weights": (), "biases": ()}, "0 weights"),
        ({"weights": (W,), "biases": ()}, "1 weights and 0 biases"),
        ({"weights": (W, W), "biases": (None, None)}, "weight 1 has shape"),
        ({"weights": (W,), "biases": (np.ones(3, dtype=np.float32),)}, "bias 0 has shape"),
        ({"weights": (W * np.nan,), "biases": (None,)}, "not finite"),
    ],
)
def test_refuses_what_is_no_router(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        Router(**arguments)
