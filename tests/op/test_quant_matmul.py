"""QuantMatMul: every shell has the reference's numbers, the native kernels to the bit; what is wrong is said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_shells import session
from quant_shells import (
    BODIES,
    EVERY,
    ISAS,
    NATIVE,
    Case,
    assert_bits,
    assert_close,
    make_case,
    make_model,
    open_native,
    run,
    run_reference,
)

from clada_export.native.library import ort_library_path
from clada_export.op.quant_reference import fused_multiply_add, quant_matmul, quantise_rows
from graph_passes.quant.contract import BITS, BLOCK, LEAST_AMAX
from graph_passes.quant.layout import QuantisedMatrix, pack, unpack
from graph_passes.quant.op import ContractError, QuantMatMulAttributes

FAST = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def check(shell: str, case: Case) -> None:
    found, wanted = EVERY[shell](case), run_reference(case)
    if shell in NATIVE:
        assert_bits(found, wanted)
    else:
        assert_close(found, wanted, case)


@pytest.mark.parametrize("shell", EVERY)
@pytest.mark.parametrize("bits", BITS)
def test_formats(shell: str, bits: int) -> None:
    for has_offset, has_bias in ((False, False), (True, False), (False, True), (True, True)):
        check(shell, make_case(bits, has_offset=has_offset, has_bias=has_bias, seed=bits))


@pytest.mark.parametrize("shell", EVERY)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1, 1, 9), (0,), (2, 0, 3)])
def test_leading_axes(shell: str, shape: tuple[int, ...]) -> None:
    check(shell, make_case(5, shape=shape, has_bias=True))


@pytest.mark.parametrize("shell", EVERY)
def test_sizes_that_tiles_do_not_divide(shell: str) -> None:
    for n, k in ((1, 32), (31, 32), (32, 64), (33, 224), (97, 160)):
        check(shell, make_case(6, n=n, k=k, has_offset=True))


@pytest.mark.parametrize("shell", NATIVE)
def test_the_largest_sums_do_not_saturate(shell: str) -> None:
    """All codes at an end of their range, all of x at an end of its own, in every combination of signs."""
    for bits in BITS:
        for code in (0, (1 << bits) - 1):
            codes = np.full((33, 64), code, np.uint8)
            matrix = QuantisedMatrix(codes, np.ones((33, 2), np.float16), bits)
            x = np.concatenate([np.full((1, 64), sign, np.float32) for sign in (1.0, -1.0)])
            case = Case(matrix.attributes(), x, pack(matrix))
            found = EVERY[shell](case)
            # 127 and 1 / 127 as float32 leave a rounding.
            np.testing.assert_allclose(found, np.broadcast_to(64.0 * (code - (1 << bits - 1)) * x[:, :1], (2, 33)), rtol=1e-6)
            assert_bits(found, run_reference(case))


ODD = {
    "zeros": np.zeros(32),
    "one subnormal": np.array([1e-40] + [0.0] * 31),
    "just below": np.full(32, np.nextafter(np.float32(LEAST_AMAX), np.float32(0))),
    "the least": np.full(32, LEAST_AMAX),
    "huge": np.array([np.finfo(np.float32).max, -np.finfo(np.float32).max] + [1e30] * 30),
    "halves": np.array([127.0] + [i + 0.5 for i in range(-15, 16)]),
    "nan": np.array([np.nan] + [1.0] * 31),
    "negative nan": np.array([1.0] * 31 + [-np.nan]),
    "infinity": np.array([1.0, np.inf] + [1.0] * 30),
    "minus infinity": np.array([-np.inf] + [np.nan] * 31),
}


@pytest.mark.parametrize("shell", EVERY)
def test_odd_rows(shell: str) -> None:
    """Each odd block first, in the middle and last; the rows beside it stay what they are."""
    for bits, has_offset in ((8, False), (4, True)):
        case = make_case(bits, shape=(3 * len(ODD),), has_offset=has_offset)
        x = case.x.copy()
        for i, block in enumerate(ODD.values()):
            for place in range(3):
                x[3 * i + place, 32 * place : 32 * place + 32] = block.astype(np.float32)
        check(shell, replace(case, x=x))


def test_odd_blocks_in_8_bits() -> None:
    q, scale = quantise_rows(np.stack(list(ODD.values())).astype(np.float32))
    found = dict(zip(ODD, zip(q[:, 0], scale[:, 0], strict=True), strict=True))
    for name in ("zeros", "one subnormal", "just below"):
        assert not found[name][0].any() and found[name][1] == 0
    for name in ("nan", "negative nan", "infinity", "minus infinity"):
        assert not found[name][0].any() and np.isnan(found[name][1])
    assert (found["the least"][0] == 127).all() and found["the least"][1] == np.float32(LEAST_AMAX) / np.float32(127)
    assert found["huge"][0][:2].tolist() == [127, -127] and np.isfinite(found["huge"][1])
    assert found["halves"][0][1:].tolist() == [2 * round((i + 0.5) / 2) for i in range(-15, 16)]


@pytest.mark.parametrize("shell", EVERY)
def test_a_bad_row_and_a_bad_scale_stay_by_themselves(shell: str) -> None:
    case = make_case(8, shape=(3,), n=40, k=64)
    good = EVERY[shell](case)
    x, weight = case.x.copy(), case.weight.copy()
    x[1, 40] = np.inf
    scales = weight[..., -64:].view(np.float16)
    scales[0, 1, 7] = np.nan
    scales[1, 0, 2] = np.inf  # row 34
    found = EVERY[shell](replace(case, x=x, weight=weight))
    assert np.isnan(found[1]).all() and np.isnan(found[:, 7]).all()
    assert not np.isfinite(found[:, 34]).any()
    others = [n for n in range(40) if n not in (7, 34)]
    np.testing.assert_array_equal(found[[0, 2]][:, others], good[[0, 2]][:, others])


@FAST
@given(data=st.data())
def test_bits_depend_on_neither_threads_nor_company_nor_instruction_set(data: st.DataObject) -> None:
    draw = data.draw
    case = make_case(
        draw(st.sampled_from(BITS)), shape=(draw(st.integers(1, 40)),), n=draw(st.integers(1, 300)),
        k=BLOCK * draw(st.integers(1, 12)), has_offset=draw(st.booleans()), has_bias=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )  # fmt: skip
    first, other = (draw(st.sampled_from(list(NATIVE))).removeprefix("ort_") for _ in range(2))
    together = run(open_native(case, first, threads=1), case)
    several = open_native(case, other, threads=3)
    assert_bits(run(several, case), together)
    for r in {0, len(case.x) // 2, len(case.x) - 1}:
        assert_bits(run(several, replace(case, x=case.x[r : r + 1])), together[r : r + 1])
    assert_bits(together, run_reference(case))


def test_more_rows_than_a_pass_keeps() -> None:
    case = make_case(4, shape=(530,), n=70, k=64, has_bias=True)
    assert_bits(run(open_native(case, threads=2), case), run_reference(case))


def test_fused_multiply_add_rounds_once() -> None:
    """Against exact fractions, on numbers whose products lie near ties."""
    from fractions import Fraction

    rng = np.random.default_rng(3)
    a = rng.integers(-(2**19), 2**19, 4000).astype(np.float32)
    b = (rng.integers(2**23, 2**24, 4000) * 2.0 ** rng.integers(-40, -20, 4000)).astype(np.float32)
    # c makes the sum a tie of float32, or one bit of float64 beside it.
    c = (-a.astype(np.float64) * b + rng.integers(2**24, 2**25, 4000)).astype(np.float32)
    found = fused_multiply_add(a, b, c)
    for i in range(4000):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        near = np.float32(float(exact))  # two roundings: at most one float32 beside the nearest
        candidates = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
        errors = [abs(Fraction(float(each)) - exact) for each in candidates]
        assert abs(Fraction(float(found[i])) - exact) == min(errors)
        if errors.count(min(errors)) > 1:
            assert found[i].view(np.int32) % 2 == 0, "ties go to the even one"


def test_the_shape_of_y_is_known() -> None:
    case = make_case(8, shape=(2, 3), n=40)
    found = open_native(case, constant=True).get_outputs()[0]
    assert found.type == "tensor(float)" and found.shape[-1] == 40 and found.shape[:2] == ["x_0", "x_1"]


def test_a_nodes_defaults_are_the_contracts() -> None:
    case = make_case(8)
    bare = open_native(case, bits=None, has_offset=None, has_bias=None)
    assert_bits(run(bare, case), run_reference(case))
    assert QuantMatMulAttributes.from_onnx({"out_features": 40}) == case.attributes


def refused(case: Case, *parts: str, **changes: object) -> None:
    with pytest.raises(Exception, match="QuantMatMul node 'layer7/q_proj'") as error:
        run(open_native(case, **changes), case)
    for part in parts:
        assert part in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"bits": 7}, ("'bits'", "7", "4, 5, 6, 8")),
        ({"bits": 0}, ("'bits'", "0", "4, 5, 6, 8")),
        ({"bits": 8.0}, ("'bits'", "a float", "an int")),
        ({"out_features": 0}, ("'out_features'", "0", "at least 1")),
        ({"out_features": 2**31}, ("'out_features'", "2147483648")),
        ({"out_features": None}, ("'out_features'", "not there")),
        ({"has_offset": 2}, ("'has_offset'", "2", "0, 1")),
        ({"has_offset": 1}, ("'weight'", "[2, 3, 1088]", "[2, 3, 1152]")),
        ({"has_bias": 1}, ("2 inputs", "has_bias = 1", "3")),
        ({"out_features": 65}, ("'weight'", "[2, 3, 1088]", "[3, 3, 1088]", "65")),
        ({"bits": 4}, ("'weight'", "[2, 3, 1088]", "[2, 3, 576]")),
    ],
)
def test_bad_attributes(changes: dict[str, object], parts: tuple[str, ...]) -> None:
    refused(make_case(8), *parts, **changes)


def test_bad_inputs() -> None:
    case = make_case(8, has_bias=True)
    assert case.bias is not None
    refused(replace(case, x=case.x[:, :95]), "'x'", "[5, 95]", "multiple of 32")
    refused(replace(case, x=case.x[:, :0]), "'x'", "[5, 0]", "multiple of 32")
    refused(replace(case, x=case.x[:, :64]), "'weight'", "[2, 3, 1088]", "[2, 2, 1088]", "width 64")
    refused(replace(case, weight=case.weight[:1]), "'weight'", "[1, 3, 1088]", "[2, 3, 1088]")
    refused(replace(case, weight=case.weight[0]), "'weight'", "[3, 1088]")
    refused(replace(case, weight=case.weight.view(np.int8)), "'weight'", "int8", "uint8")
    refused(replace(case, bias=case.bias[:39]), "'bias'", "[39]", "[40]")


def test_a_constant_weight_is_checked_when_the_session_is_made() -> None:
    case = make_case(8)
    refused(replace(case, x=case.x[:, :64]), "'x'", "[5, 64]", "last axis must be 96", constant=True)
    with pytest.raises(Exception, match=r"q_proj': input 'weight' has shape \[1, 3, 1088\]; wanted \[2, 3, 1088\]"):
        open_native(replace(case, weight=case.weight[:1]), constant=True)
    refused(replace(case, weight=case.weight.view(np.int8)), "'weight'", "int8", "uint8", constant=True)
    refused(replace(case, weight=case.weight[0]), "'weight'", "[3, 1088]", constant=True)
    large = make_case(6, shape=(9,), n=200, k=320)
    for each in (case, large, replace(case, x=case.x[:0])):
        assert_bits(run(open_native(each, constant=True, threads=2), each), run_reference(each))


def test_unknown_instruction_set() -> None:
    with pytest.raises(Exception, match=r"q_proj.*'mmx'.*" + ", ".join(ISAS[:-1]) + f" or {ISAS[-1]}"):
        open_native(make_case(8), "mmx")


def test_both_ops_in_one_session() -> None:
    """One name of an instruction set serves both."""
    from op_shells import make_case as sparse_case
    from op_shells import make_model as sparse_model

    from graph_passes.op import SparseFFNAttributes

    quant, sparse = make_model(make_case(8)), sparse_model(sparse_case(SparseFFNAttributes()))
    for value in (*quant.graph.input, *quant.graph.output):
        value.name = f"quant_{value.name}"
    for node in quant.graph.node:
        node.input[:] = [f"quant_{name}" for name in node.input]
        node.output[:] = [f"quant_{name}" for name in node.output]
    for field in ("node", "input", "output", "initializer"):
        getattr(sparse.graph, field).extend(getattr(quant.graph, field))
    for shell in NATIVE:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CLADA_ISA", shell.removeprefix("ort_"))
            session(sparse, library=ort_library_path())


def test_the_reference_refuses() -> None:
    case = make_case(8)
    with pytest.raises(ContractError, match="96 columns and the weight 64"):
        quant_matmul(case.x, case.weight[:, :2], case.attributes)
    with pytest.raises(ContractError, match=r"uint8 \[2, 3, 1000\]; wanted uint8 \[2, K / 32, 1088\]"):
        quant_matmul(case.x, case.weight[..., :1000], case.attributes)
    with pytest.raises(ContractError, match="has_bias is 0, but a bias is given"):
        quant_matmul(case.x, case.weight, case.attributes, np.zeros(40, np.float32))


def test_bodies_are_all_there() -> None:
    assert set(EVERY) == set(NATIVE) | set(BODIES) and "ort_baseline" in NATIVE


@FAST
@given(data=st.data())
def test_unpacking_gives_what_was_packed(data: st.DataObject) -> None:
    draw, rng = data.draw, np.random.default_rng(data.draw(st.integers(0, 1000)))
    bits, n, blocks = draw(st.sampled_from(BITS)), draw(st.integers(1, 2200)), draw(st.integers(1, 5))
    halves = [rng.standard_normal((n, blocks)).astype(np.float16) for _ in range(2)]
    codes = rng.integers(0, 1 << bits, (n, blocks * BLOCK), dtype=np.uint8)
    matrix = QuantisedMatrix(codes, halves[0], bits, halves[1] if draw(st.booleans()) else None)
    found = unpack(pack(matrix), matrix.attributes())
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scale, matrix.scale)
    assert (found.offset is None) == (matrix.offset is None)
    if matrix.offset is not None:
        np.testing.assert_array_equal(found.offset, matrix.offset)
