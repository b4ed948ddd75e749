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
    fixed = {"load_slope": 0.3, "emit_stat": True, "emit_active": True} | stat | changes
    return SparseFFNAttributes(score=score, rule=rule, **fixed)


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
        for rule in RULES:
            wanted = SparseFFNAttributes(score=score, rule=rule, emit_active=True)
            check(shell, attributes=wanted, shape=shape, load=torch.full(shape, 0.2))


@pytest.mark.parametrize("shell", SHELLS)
def test_threshold_per_granule(shell: str) -> None:
    threshold = torch.linspace(0.1, 1.2, 24)
    for rule in ("threshold", "relative"):
        check(shell, attributes=attributes("exact", rule, granule=4), threshold=threshold * (1 if rule == "threshold" else 0.5))


INF, NAN = float("inf"), float("nan")
LARGEST, SMALLEST = 3.4028234663852886e38, 1e-45
LOADS = torch.tensor([[0.0, 0.7, -0.9, INF, -INF, NAN]])


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("value", [0.0, SMALLEST, 1e-38, LARGEST, INF])
def test_thresholds_at_the_edge_of_float32(shell: str, value: float) -> None:
    for score, rule in (("gate", "threshold"), ("exact", "relative"), ("external", "relative"), ("external", "topk")):
        wanted = attributes(score, rule, granule=2)
        check(shell, attributes=wanted, shape=(1, 6), load=LOADS, threshold=torch.tensor([value]))


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("slope", [3e38, -3e38, 1e-45])
def test_loads_beyond_what_exp_can_hold(shell: str, slope: float) -> None:
    """The multiplier is one of its limits, whatever the exponential overflows to; 0 * load is no NaN."""
    load = torch.tensor([[0.0, 1e-30, -1e-30, 3.0, -3.0, LARGEST, -LARGEST, INF, -INF]])
    for low, high in ((0.25, 4.0), (SMALLEST, LARGEST), (2.0, 2.0)):
        for rule in ("threshold", "topk"):
            wanted = attributes("external", rule, load_slope=slope, load_min=low, load_max=high)
            check(shell, attributes=wanted, shape=(1, 9), load=load)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "values",
    [[0.0], [NAN], [-1.0], [INF], [0.5, -1.0], [0.5, 0.0], [0.5, INF], [1e38, 1e-45, 1e-38, 0.0], [0.5, 0.2, NAN, -0.0]],
)
def test_any_statistic(shell: str, rule: str, values: list[float]) -> None:
    """Negative, infinite and missing numbers in past_stat, as prior and as score."""
    stat = torch.tensor(values).repeat(96)[:96].reshape(1, 96)
    for score, gamma, floor in (("prefix", 0.0, 0.0), ("prefix", 0.4, 0.1), ("external", 0.4, 0.0), ("external", 3.0, 0.9)):
        for granule in (1, 4):
            wanted = attributes(score, rule, granule=granule, use_stat=True, prior_gamma=gamma, backbone_min=floor)
            # Numbers that are as large as each other are so in every shell.
            check(shell, attributes=wanted, shape=(1, 6), load=LOADS, past_stat=stat, clear=score != "prefix")


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "values", [[NAN], [INF], [-INF], [-1.0, -2.0], [0.0, -0.0], [0.5, NAN, INF, -INF, -0.0, 0.0, -3.0, SMALLEST]]
)
def test_any_score(shell: str, rule: str, values: list[float]) -> None:
    """Given scores of every kind, with ties, and with granules that the prior drops."""
    score = torch.tensor(values).repeat(48)[:48].expand(1, 6, 48)
    stat = (torch.arange(96) % 7 / 3.0).reshape(1, 96)
    for changes in ({}, {"use_stat": True, "backbone_min": 0.5}):
        wanted = attributes("external", rule, granule=2, **changes)
        same = {"attributes": wanted, "shape": (1, 6), "load": LOADS, "score": score.contiguous()}
        for threshold in (0.0, 0.3, 11.0):
            check(shell, **same, threshold=torch.tensor([threshold]), past_stat=stat if changes else None)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("rule", RULES)
def test_one_granule_and_one_neuron(shell: str, rule: str) -> None:
    for score in SCORES:
        for f, granule in ((1, 1), (70, 70), (256, 256)):
            for has_bias in (False, True):
                check(shell, attributes=attributes(score, rule, granule=granule, has_bias=has_bias), f=f)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_no_rows(shell: str, shape: tuple[int, int]) -> None:
    # ONNX's Reshape, which spreads a given score over a sequence, has no empty batch.
    for score in SCORES[:-1] if shell == "function_body" else SCORES:
        for use_stat in (False, True):
            for granule in (1, 4):
                wanted = attributes(score, "threshold", granule=granule, use_stat=use_stat or score == "prefix")
                check(shell, attributes=wanted, shape=shape, load=torch.zeros(shape))
