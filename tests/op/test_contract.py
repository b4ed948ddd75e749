"""Every shell gives the reference's numbers, over the op's whole range of attributes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_shells import SHELLS, assert_same, make_case

from graph_passes.op import ACTIVATIONS, RULES, SCORES, STAT_NORMS, SparseFFNAttributes

# Of x and the weights.
TYPES = {
    "f32": (torch.float32, torch.float32),
    "f16_weights": (torch.float32, torch.float16),
    "bf16_weights": (torch.float32, torch.bfloat16),
    "f16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
}


def attributes(score: str, rule: str, **changes: object) -> SparseFFNAttributes:
    stat = {"use_stat": True} if score == "prefix" else {}
    return SparseFFNAttributes(score=score, rule=rule, load_slope=0.3, emit_stat=True, emit_active=True, **(stat | changes))


def check(shell: str, **settings: object) -> None:
    case = make_case(**settings)
    assert_same(SHELLS[shell](case), case.reference(), case.x.dtype)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("score", SCORES)
def test_score_rule_activation(shell: str, score: str, rule: str, activation: str) -> None:
    for gated, bias in ((True, False), (False, True)):
        check(shell, attributes=attributes(score, rule, activation=activation, gated=gated, has_bias=bias))


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("score", SCORES)
def test_types_and_granules(shell: str, score: str, types: str) -> None:
    x_dtype, dtype = TYPES[types]
    for granule in (1, 4, 96):  # 96: one granule is wider than a block of the native kernel
        for rule in RULES:
            wanted = attributes(score, rule, granule=granule, has_bias=True)
            check(shell, attributes=wanted, x_dtype=x_dtype, dtype=dtype, f=192)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("score", SCORES)
def test_prior(shell: str, score: str, rule: str) -> None:
    for granule in (1, 4):
        wanted = attributes(score, rule, granule=granule, use_stat=True, backbone_min=0.6, prior_gamma=0.4)
        check(shell, attributes=wanted)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("per_sequence", [False, True])
def test_weighted(shell: str, per_sequence: bool) -> None:
    for granule in (1, 8, 96):
        wanted = attributes("external", "topk", granule=granule, combine="weighted")
        check(shell, attributes=wanted, f=192, per_sequence=per_sequence)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("load", ["finite", "inf", "-inf", "nan"])
def test_uniform_loads(shell: str, load: str) -> None:
    value = 0.3 if load == "finite" else float(load)
    for score in ("gate", "shadow"):
        check(shell, attributes=attributes(score, "threshold", has_bias=True), load=torch.full((2, 5), value))


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("types", TYPES)
def test_prompts(shell: str, types: str) -> None:
    """200 rows: the native kernel's GEMM path, alone and mixed with sparse and padding rows."""
    x_dtype, dtype = TYPES[types]
    same = {"shape": (2, 100), "x_dtype": x_dtype, "dtype": dtype}
    dense = torch.full((2, 100), float("inf"))
    mixed = dense.clone()
    mixed[0, :7] = float("-inf")
    mixed[1, 40:50] = 0.4
    mixed[1, 50] = float("nan")
    for load in (dense, mixed):
        for changes in ({}, {"gated": False, "has_bias": True}, {"has_bias": True, "use_stat": True}):
            check(shell, attributes=attributes("gate", "threshold", **changes), load=load, **same)
    weighted = attributes("external", "threshold", combine="weighted", granule=4)
    check(shell, attributes=weighted, load=mixed, per_sequence=True, **same)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("stat_norm", STAT_NORMS)
def test_statistic(shell: str, stat_norm: str, types: str) -> None:
    """One row, few rows and prompts, the rows that count among rows of zeros, sparse rows, padding and NaN loads."""
    x_dtype, dtype = TYPES[types]
    inf = float("inf")
    mixed = torch.full((2, 30), inf)
    mixed[0, :7], mixed[1, 10:14], mixed[1, 14] = -inf, 0.4, float("nan")
    few = torch.tensor([[inf, 0.3, -inf, inf], [-inf, inf, inf, float("nan")]])
    same = {"x_dtype": x_dtype, "dtype": dtype}
    for changes in ({}, {"gated": False}, {"use_stat": True}, {"has_bias": True}):
        wanted = attributes("gate", "threshold", stat_norm=stat_norm, **changes)
        for value in (inf, 0.3):
            check(shell, attributes=wanted, shape=(1, 1), load=torch.full((1, 1), value), **same)
        check(shell, attributes=wanted, shape=(1, 1), load=torch.full((1, 1), inf), zero_row=(0, 0), **same)
        check(shell, attributes=wanted, shape=(2, 4), load=few, zero_row=(0, 3), **same)
        check(shell, attributes=wanted, shape=(2, 30), load=mixed, zero_row=(0, 9), **same)
    for score, rule in (("exact", "relative"), ("shadow", "topk"), ("prefix", "threshold")):
        check(shell, attributes=attributes(score, rule, stat_norm=stat_norm), shape=(2, 4), load=few, **same)
    # The weights of experts do not enter it.
    weighted = attributes("external", "topk", stat_norm=stat_norm, combine="weighted", granule=4)
    for shape, load in (((2, 4), few), ((2, 30), mixed)):
        check(shell, attributes=weighted, shape=shape, load=load, **same)


@pytest.mark.parametrize("shell", SHELLS)
def test_statistic_of_magnitudes(shell: str) -> None:
    """Without a norm, the root of the statistic is each neuron's L2 norm over the prompt; rows count by their size."""
    wanted = SparseFFNAttributes(gated=False, activation="identity", emit_stat=True, stat_norm="none")
    for rows in (1, 6, 40):
        same = {"attributes": wanted, "shape": (1, rows), "load": torch.full((1, rows), float("inf"))}
        case = make_case(**same)
        hidden = case.x[0].double() @ case.tensors.w_in[:, 0].double().T
        np.testing.assert_allclose(np.sqrt(case.reference()["stat"][0]), hidden.norm(dim=0).numpy(), rtol=1e-5, atol=1e-6)
        check(shell, **same)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 3)])
def test_other_ranks(shell: str, shape: tuple[int, ...]) -> None:
    if shell == "function_body":
        pytest.skip("the function body is made for models, where x is [B, S, d]")
    for score in ("shadow", "external"):
        wanted = SparseFFNAttributes(score=score, emit_active=True)
        check(shell, attributes=wanted, shape=shape, load=torch.full(shape, 0.2))


@pytest.mark.parametrize("shell", SHELLS)
def test_threshold_per_granule(shell: str) -> None:
    threshold = torch.linspace(0.1, 1.2, 24)
    for rule in ("threshold", "relative"):
        check(shell, attributes=attributes("exact", rule, granule=4), threshold=threshold * (1 if rule == "threshold" else 0.5))
