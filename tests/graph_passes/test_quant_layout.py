"""How matrices are quantised and packed for QuantMatMul."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graph_passes.quant.contract import BITS, BLOCK
from graph_passes.quant.layout import QuantisedMatrix, pack, unpack
from graph_passes.quant.op import ContractError, QuantMatMulAttributes, record_bytes, weight_shape
from graph_passes.quant.quantise import quantise

FAST = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def normal(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def error(matrix: QuantisedMatrix, weight: np.ndarray, importance: np.ndarray | None = None) -> float:
    """Squared, weighed, of the whole matrix."""
    squares = (matrix.dequantise().astype(np.float64) - weight) ** 2
    return float((squares if importance is None else squares * importance).sum())


def test_a_record_by_hand() -> None:
    """Code (row, k) of a tile, in each plane, where the page says that it lies."""
    rng = np.random.default_rng(1)
    for bits in BITS:
        low_bits = bits - 4
        codes = rng.integers(0, 1 << bits, (40, 64), dtype=np.uint8)
        scale, offset = (rng.standard_normal((40, 2)).astype(np.float16) for _ in range(2))
        packed = pack(QuantisedMatrix(codes, scale, bits, offset))
        assert packed.shape == (2, 2, 32 * 32 * bits // 8 + 128)
        for row, k in ((0, 0), (5, 39), (31, 63), (32, 17), (39, 32)):
            record, step, byte = packed[row // 32, k // 32], k % 32 // 4, 4 * (row % 32) + k % 4
            high = record[step // 2 * 128 + byte] >> 4 * (step % 2) & 15
            code = int(high) << low_bits
            if low_bits:
                per = 8 // low_bits
                code |= int(record[512 + step // per * 128 + byte]) >> low_bits * (step % per) & (1 << low_bits) - 1
            assert code == codes[row, k]
            halves = record[128 * bits :].view(np.float16)
            assert (halves[row % 32], halves[32 + row % 32]) == (scale[row, k // 32], offset[row, k // 32])
        assert not packed[1, :, 128 * bits :].view(np.float16)[:, 8:32].any(), "rows beyond N have scales of 0"


@FAST
@given(data=st.data())
def test_rounding_is_within_half_a_step(data: st.DataObject) -> None:
    draw = data.draw
    bits, has_offset = draw(st.sampled_from(BITS)), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    n, k = draw(st.integers(1, 40)), BLOCK * draw(st.integers(1, 4))
    weight = (rng.standard_normal((n, k)) * 2.0 ** rng.integers(-6, 7, (n, 1)) + draw(st.sampled_from([0, 3]))).astype(
        np.float32
    )
    weight[rng.random((n, k)) < 0.2] = 0.0
    matrix = quantise(weight, bits, has_offset=has_offset)
    step = np.abs(matrix.scale.astype(np.float32)).repeat(BLOCK, axis=1)
    # Half a step; a whole one where the range ends before the other sign's largest; and a float16's rounding of the scale.
    wrong = np.abs(matrix.dequantise() - weight)
    largest = np.abs(weight).reshape(n, -1, BLOCK).max(axis=2).repeat(BLOCK, axis=1)
    allowed = (0.5 if has_offset or bits == 8 else 1.0) * step + 2e-3 * largest + 1e-6
    assert (wrong <= allowed).all()


@pytest.mark.parametrize("has_offset", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_a_search_is_better_and_follows_importance(bits: int, has_offset: bool) -> None:
    weight = normal(64, 256)
    importance = np.random.default_rng(2).random(256).astype(np.float32) ** 4
    plain = quantise(weight, bits, has_offset=has_offset)
    searched = quantise(weight, bits, has_offset=has_offset, search=True)
    weighed = quantise(weight, bits, has_offset=has_offset, search=True, importance=importance)
    assert error(searched, weight) < error(plain, weight)
    assert error(weighed, weight, importance) < error(searched, weight, importance)


def test_more_bits_and_an_offset_are_better() -> None:
    weight = normal(64, 256)
    errors = [error(quantise(weight, bits, search=True), weight) for bits in BITS]
    assert errors == sorted(errors, reverse=True)
    shifted = weight + np.float32(2)
    assert error(quantise(shifted, 4, has_offset=True), shifted) < 0.5 * error(quantise(shifted, 4), shifted)


def test_a_matrix_on_the_grid_comes_back() -> None:
    """What a GGUF file of Q4_0 or Q8_0 holds stays what it was, signed scales included."""
    rng = np.random.default_rng(5)
    for bits in (4, 8):
        codes = rng.integers(1, 1 << bits, (40, 96), dtype=np.uint8)
        codes.reshape(40, 3, 32)[:, :, 7] = 0 if bits == 4 else 1  # the end of the range is there, as those files have it
        scale = rng.standard_normal((40, 3)).astype(np.float16)
        weight = QuantisedMatrix(codes, scale, bits).dequantise()
        np.testing.assert_allclose(quantise(weight, bits).dequantise(), weight, rtol=1e-3, atol=1e-6)


def test_odd_blocks() -> None:
    """Zeros, one number, numbers too small and too large for a float16 scale: finite, and zeros stay zeros."""
    weight = np.zeros((6, 32), np.float32)
    weight[1] = 0.3
    weight[2, 4] = -1e-12
    weight[3, :2] = 3e38, -3e38
    weight[4] = np.linspace(1e6, 1.1e6, 32)
    for bits in BITS:
        for has_offset in (False, True):
            for search in (False, True):
                found = quantise(weight, bits, has_offset=has_offset, search=search).dequantise()
                assert np.isfinite(found).all()
                assert not found[[0, 5]].any()
                np.testing.assert_allclose(found[1], weight[1], rtol=0.02)
                assert (np.abs(found[2]) <= 1e-6).all()


def test_threads_change_nothing() -> None:
    weight = normal(300, 1024)
    one, three = (quantise(weight, 5, has_offset=True, search=True, threads=threads) for threads in (1, 3))
    np.testing.assert_array_equal(pack(one), pack(three))


def test_bad_matrices() -> None:
    weight = normal(4, 64)
    with pytest.raises(ContractError, match=r"\[4, 60\]; wanted \[N, K\], K a multiple of 32"):
        quantise(weight[:, :60], 4)
    weight[2, 33] = np.nan
    with pytest.raises(ContractError, match="row 2, column 33 is nan"):
        quantise(weight, 4)
    with pytest.raises(ContractError, match="importance"):
        quantise(normal(4, 64), 4, search=True, importance=np.ones(63, np.float32))
    with pytest.raises(ContractError, match="importance"):
        quantise(normal(4, 64), 4, search=True, importance=-np.ones(64, np.float32))


def test_bad_parts() -> None:
    codes, scale = np.zeros((40, 64), np.uint8), np.ones((40, 2), np.float16)
    for name, bad in (("nan", np.nan), ("inf", -np.inf)):
        broken = scale.copy()
        broken[3, 1] = bad
        with pytest.raises(ContractError, match=f"scale of row 3, block 1 is -?{name}"):
            QuantisedMatrix(codes, broken, 8)
        with pytest.raises(ContractError, match=f"offset of row 3, block 1 is -?{name}"):
            QuantisedMatrix(codes, scale, 8, broken)
    pack(QuantisedMatrix(codes, -scale, 8)), pack(QuantisedMatrix(codes, 0 * scale, 8))  # both mean something
    with pytest.raises(ContractError, match=r"a code is 16; wanted codes below 2\^4"):
        QuantisedMatrix(codes + np.uint8(16), scale, 4)
    with pytest.raises(ContractError, match=r"scale is float16 \[40, 1\]; wanted float16 \[40, 2\]"):
        QuantisedMatrix(codes, scale[:, :1], 8)
    with pytest.raises(ContractError, match=r"codes are int8"):
        QuantisedMatrix(codes.view(np.int8), scale, 8)
    with pytest.raises(ContractError, match="'bits' is 7; allowed: 4, 5, 6, 8"):
        QuantisedMatrix(codes, scale, 7)
    with pytest.raises(ContractError, match=r"wanted uint8 \[2, K / 32, 576\]"):
        unpack(np.zeros((2, 2, 1088), np.uint8), QuantMatMulAttributes(40, 4))


def test_sizes() -> None:
    assert weight_shape(QuantMatMulAttributes(33, 5, True), 96) == (2, 3, record_bytes(5, True)) == (2, 3, 768)
    with pytest.raises(ContractError, match="in_features is 48; wanted a multiple of 32"):
        weight_shape(QuantMatMulAttributes(33), 48)
    for wrong in (0, 2**31):
        with pytest.raises(ContractError, match=f"'out_features' is {wrong}"):
            QuantMatMulAttributes(wrong)
