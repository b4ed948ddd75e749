"""Properties of the op's meaning that hold whatever the shell."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clada_export.op.reference import (
    SparseFFNTensors,
    dequantize_shadow,
    load_multiplier,
    quantize_shadow,
    select_granules,
    sparse_ffn,
)
from graph_passes.op import ContractError, SparseFFNAttributes


def _tensors(f: int, d: int, threshold: float, seed: int = 0) -> SparseFFNTensors:
    generator = torch.Generator().manual_seed(seed)
    w_in = torch.randn(f, 2, d, generator=generator) / d**0.5
    w_out = torch.randn(f, d, generator=generator) / f**0.5
    shadow, shadow_scale = quantize_shadow(w_in)
    return SparseFFNTensors(w_in, w_out, torch.tensor([threshold]), w_out.norm(dim=1), shadow, shadow_scale)


@given(st.integers(0, 2**31 - 1), st.integers(1, 4), st.sampled_from([32, 64, 96]))
def test_shadow_keeps_weights_of_a_4_bit_grid(seed: int, f: int, d: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (f, 2, d // 32, 32), generator=generator).float()
    # Both ends of the grid occur, as a 4-bit quantiser leaves them.
    q[..., 0], q[..., 1] = 0, 15
    scale = torch.rand(f, 2, d // 32, 1, generator=generator).half().float() * 0.01 + 2**-8
    scale, offset = scale.half().float(), -(scale * 7.5).half().float()
    weights = (offset + scale * q).reshape(f, 2, d)
    torch.testing.assert_close(dequantize_shadow(*quantize_shadow(weights)), weights, rtol=0, atol=float(scale.max()) * 2e-2)


@given(st.integers(0, 2**31 - 1))
def test_shadow_error_is_half_a_step(seed: int) -> None:
    weights = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(seed))
    shadow, scale = quantize_shadow(weights)
    error = (dequantize_shadow(shadow, scale) - weights).abs().reshape(3, 2, 2, 32)
    # Half a step, and what rounding scale and offset to float16 moves the ends of the grid by.
    bound = scale[..., 0].float() * (0.5 + 15 * 2**-11) + scale[..., 1].float().abs() * 2**-10
    assert bool((error <= bound.unsqueeze(-1) + 1e-7).all())


def test_shadow_of_a_constant_block_is_exact() -> None:
    weights = torch.full((2, 1, 32), 0.5)
    assert torch.equal(dequantize_shadow(*quantize_shadow(weights)), weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_shadow_refuses_weights_that_are_not_finite(value: float) -> None:
    weights = torch.zeros(1, 1, 32)
    weights[0, 0, 3] = value
    with pytest.raises(ContractError, match="not finite"):
        quantize_shadow(weights)


@given(st.floats(-4, 4), st.floats(0, 2))
def test_a_higher_load_never_raises_a_threshold(load: float, slope: float) -> None:
    attributes = SparseFFNAttributes(load_slope=slope)
    low, high = load_multiplier(torch.tensor([load, load + 0.5]), attributes)
    assert high <= low
    assert attributes.load_min <= float(high) and float(low) <= attributes.load_max


@pytest.mark.parametrize("score", ["gate", "exact", "shadow"])
def test_loads_that_are_not_numbers(score: str) -> None:
    tensors = _tensors(24, 32, 0.1)
    attributes = SparseFFNAttributes(score=score, load_slope=0.25)
    x = torch.randn(4, 32)
    load = torch.tensor([float("inf"), float("nan"), float("-inf"), 0.0])
    result = sparse_ffn(x, load, tensors, attributes)
    assert result.active[:3].tolist() == [24, 24, 0]
    assert 0 < int(result.active[3]) < 24
    assert bool((result.y[2] == 0).all())
    gate, up = tensors.w_in[:, 0], tensors.w_in[:, 1]
    dense = (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ tensors.w_out
    torch.testing.assert_close(result.y[:2], dense[:2])


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, float("nan")]), min_size=1, max_size=12), st.integers(1, 12))
def test_topk_takes_the_best_and_ties_go_to_the_lowest_index(scores: list[float], k: int) -> None:
    attributes = SparseFFNAttributes(rule="topk")
    row = torch.tensor([scores])
    active = select_granules(row, torch.tensor([float(k)]), torch.ones(1), attributes, None)[0]
    key = [(-float("inf") if score != score else -score, index) for index, score in enumerate(scores)]
    wanted = {index for _, index in sorted(key)[: min(k, len(scores))]}
    assert set(active.nonzero().flatten().tolist()) == wanted


def test_x_has_float32_or_the_weights_type() -> None:
    tensors, attributes, load = _tensors(24, 32, 0.1), SparseFFNAttributes(score="exact"), torch.zeros(3)
    x = torch.randn(3, 32)
    narrow = replace(tensors, w_in=tensors.w_in.bfloat16(), w_out=tensors.w_out.bfloat16())
    assert sparse_ffn(x, load, narrow, attributes).y.dtype == torch.float32
    x = x.bfloat16()
    rounded = sparse_ffn(x, load, narrow, attributes).y
    assert torch.equal(rounded, sparse_ffn(x.float(), load, narrow, attributes).y.bfloat16())
    with pytest.raises(ContractError, match="'x' has type float16; wanted float32 or bfloat16"):
        sparse_ffn(x.half(), load, narrow, attributes)
    with pytest.raises(ContractError, match=r"'x' has type bfloat16; wanted float32$"):
        sparse_ffn(x, load, tensors, attributes)
    with pytest.raises(ContractError, match="'w_out' has type float16; wanted bfloat16"):
        sparse_ffn(x, load, replace(narrow, w_out=tensors.w_out.half()), attributes)


def test_wrong_shapes_are_named() -> None:
    tensors = _tensors(24, 32, 0.1)
    attributes = SparseFFNAttributes()
    with pytest.raises(ContractError, match=r"'x' has shape \[2, 16\]"):
        sparse_ffn(torch.zeros(2, 16), torch.zeros(2), tensors, attributes)
    with pytest.raises(ContractError, match=r"'load' has shape \[3\]; wanted \[2\]"):
        sparse_ffn(torch.zeros(2, 32), torch.zeros(3), tensors, attributes)
    with pytest.raises(ContractError, match="negative or NaN"):
        sparse_ffn(torch.zeros(2, 32), torch.zeros(2), _tensors(24, 32, float("nan")), attributes)
