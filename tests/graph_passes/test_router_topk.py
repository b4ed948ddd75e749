"""Routers that gate like a mixture of experts: a softmax over the k best, in the nodes and in PyTorch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clada_export.op.router import RouterModule
from graph_passes.op import ContractError
from graph_passes.router import Router
from tests.graph_passes.test_router import GRANULES, HIDDEN, random_router, rows, run_nodes


def by_hand(logits: list[float], k: int) -> list[float]:
    """The scores of one row, written out."""
    chosen = sorted(range(len(logits)), key=lambda index: (-logits[index], index))[:k]
    top = max(logits)
    total = sum(math.exp(logits[index] - top) for index in chosen)
    return [math.exp(value - top) / total if index in chosen else 0.0 for index, value in enumerate(logits)]


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    layers=st.integers(1, 3),
    k=st.integers(1, GRANULES),
    shape=st.sampled_from([(1,), (6,), (2, 3), (1, 1), (2, 1, 2)]),
    scale=st.sampled_from([1.0, 4.0]),
)
def test_nodes_module_and_formula_agree(seed: int, layers: int, k: int, shape: tuple[int, ...], scale: float) -> None:
    router = random_router(seed, layers, hidden="tanh", output="topk_softmax", k=k, scale=scale)
    x = rows(seed, *shape)
    found = run_nodes([router], x, np.zeros(shape, dtype=np.float32))[0]
    module = RouterModule(router)
    np.testing.assert_allclose(found, module(torch.from_numpy(x)).numpy(), rtol=2e-5, atol=1e-6)
    logits = module.logits(torch.from_numpy(x)).reshape(-1, GRANULES).double().tolist()
    wanted = np.array([by_hand(row, k) for row in logits]) * scale
    np.testing.assert_allclose(found.reshape(-1, GRANULES), wanted, rtol=1e-4, atol=1e-6)
    assert ((found > 0).sum(-1) <= k).all()
    np.testing.assert_allclose(found.sum(-1), scale, rtol=1e-5)


def test_ties_go_to_the_lowest_index() -> None:
    weight = np.zeros((GRANULES, HIDDEN), dtype=np.float32)
    weight[3, 0] = 1.0
    router = Router((weight,), (None,), output="topk_softmax", k=3)
    x = np.zeros((2, HIDDEN), dtype=np.float32)
    x[1, 0] = 1.0
    found = run_nodes([router], x, np.zeros(2, dtype=np.float32))[0]
    np.testing.assert_array_equal(found > 0, [[True, True, True, False, False], [True, True, False, True, False]])
    np.testing.assert_allclose(RouterModule(router)(torch.from_numpy(x)).numpy(), found, rtol=1e-6)


def test_with_all_granules_it_is_a_softmax() -> None:
    x, load = rows(1, 4), np.zeros(4, dtype=np.float32)
    all_of_them = random_router(2, output="topk_softmax", k=GRANULES)
    np.testing.assert_allclose(
        run_nodes([all_of_them], x, load)[0], run_nodes([random_router(2, output="softmax")], x, load)[0], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("output", ["topk_softmax", "sigmoid"])
def test_dense_rows_may_keep_their_scores(output: str) -> None:
    k = 2 if output == "topk_softmax" else None
    x = rows(4, 4)
    load = np.array([0.0, np.inf, np.nan, -np.inf], dtype=np.float32)
    kept = random_router(3, output=output, k=k, dense_rows="scores")
    scores = RouterModule(kept)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run_nodes([kept], x, load)[0], scores, rtol=1e-5, atol=1e-6)
    ones = random_router(3, output=output, k=k)
    found = run_nodes([ones], x, load)[0]
    assert (found[1:3] == 1.0).all() and not np.isclose(scores[1:3], 1.0).all()
    for router in (kept, ones):
        under = RouterModule(router).under(torch.from_numpy(x), torch.from_numpy(load)).numpy()
        np.testing.assert_allclose(run_nodes([router], x, load)[0], under, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "topk_softmax"}, "k is None"),
        ({"output": "topk_softmax", "k": 0}, "k is 0"),
        ({"output": "topk_softmax", "k": GRANULES + 1}, f"k is {GRANULES + 1}; .* wants 1 to {GRANULES}"),
        ({"output": "softmax", "k": 2}, "output 'softmax' has none"),
        ({"dense_rows": "zeros"}, "dense_rows is 'zeros'"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        Router((np.ones((GRANULES, HIDDEN), dtype=np.float32),), (None,), **arguments)
