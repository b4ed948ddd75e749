"""SparseFFN with quantised weights: every shell has the reference's numbers, native kernels to the bit; the rest is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ffn_quant_shells import EXACT, NATIVE, SHELLS, make_case, matrices
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_shells import Case, assert_same, instruction_set, make_model, run, run_native, session
from quant_shells import assert_bits

from clada_export.native.library import ort_library_path
from clada_export.op.quant_reference import quant_matmul
from graph_passes.op import ACTIVATIONS, FORMAT_BITS, RULES, ContractError, SparseFFNAttributes, input_names, weight_shapes
from graph_passes.quant.ffn_layout import pack_in, pack_out, unpack_in, unpack_out
from graph_passes.quant.layout import pack

FAST = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
INF, NAN = float("inf"), float("nan")
FORMATS = tuple(FORMAT_BITS)


def attributes(weight_format: str = "int4", **changes: object) -> SparseFFNAttributes:
    fixed = {"score": "exact", "activation": "relu", "load_slope": 0.3, "emit_active": True}
    return SparseFFNAttributes(weight_format=weight_format, **(fixed | changes))


def check(shell: str, case: Case) -> None:
    found, wanted = SHELLS[shell](case), case.eager()
    if shell in NATIVE and case.attributes.activation in EXACT:
        assert_bits(found["y"], wanted["y"])
        np.testing.assert_array_equal(found["active"], wanted["active"])
    else:
        assert_same(found, wanted)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("weight_format", "activation"),
    [*((each, "relu") for each in FORMATS), *(("int4", each) for each in ACTIVATIONS if each != "relu")],
)
def test_formats_and_activations(shell: str, weight_format: str, activation: str) -> None:
    for gated, bias in ((True, False), (False, True), (True, True)):
        check(shell, make_case(attributes(weight_format, activation=activation, gated=gated, has_bias=bias)))


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("rule", RULES)
def test_rules(shell: str, rule: str) -> None:
    for shape in ((1, 1), (1, 9), (3, 2)):
        check(shell, make_case(attributes("int6", rule=rule), shape=shape))


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_sizes(shell: str, weight_format: str) -> None:
    """Widths of one unit, of whole chunks of columns, and with one to three units over; one to nine rows."""
    for i, d in enumerate((32, 64, 96, 128, 160, 192, 224, 256, 576)):
        rows = 1 + i % 9
        check(shell, make_case(attributes(weight_format, gated=i % 2 == 0), d=d, f=(32, 64, 96)[i % 3], shape=(1, rows)))


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_all_and_nothing(shell: str, weight_format: str) -> None:
    for load in (INF, -INF, NAN, 0.0):
        for threshold in (0.0, 1e30):
            for shape in ((1, 1), (1, 7)):
                same = {"shape": shape, "load": torch.full(shape, load), "threshold": torch.tensor([threshold])}
                case = make_case(attributes(weight_format, has_bias=True), **same)
                check(shell, case)
    assert not case.eager()["active"].any(), "the last case skips all"
    np.testing.assert_array_equal(case.eager()["y"], np.broadcast_to(case.tensors.down_bias.numpy(), (1, 7, 96)))


@pytest.mark.parametrize("shell", SHELLS)
def test_odd_rows(shell: str) -> None:
    """Blocks of zeros, of what is too small, and numbers that are not finite; the rows beside them stay what they are."""
    case = make_case(attributes("int5"), shape=(1, 7), load=torch.tensor([[0.0, INF, 0.3, INF, 0.0, INF, 0.2]]))
    x = case.x.clone()
    x[0, 0, :32], x[0, 1], x[0, 2, 40], x[0, 3, 3], x[0, 4, 64:] = 0.0, 0.0, NAN, INF, 1e-40
    odd = replace(case, x=x)
    found, before = SHELLS[shell](odd)["y"], SHELLS[shell](case)["y"]
    assert np.isnan(found[0, 2:4]).all() and np.isfinite(found[0, [0, 1, 4]]).all()
    np.testing.assert_array_equal(found[0, 5:], before[0, 5:])
    if shell in NATIVE:
        assert_bits(found, odd.eager()["y"])


def test_skipping_is_multiplying_by_zeros() -> None:
    """y is QuantMatMul's product of the down matrix and h with zeros in the place of skipped neurons."""
    for weight_format, bits in FORMAT_BITS.items():
        case = make_case(attributes(weight_format, activation="identity", gated=False), shape=(1, 3), load=torch.zeros(1, 3))
        up = pack(unpack_in(case.tensors.w_in.numpy(), bits, gated=False)[1])
        down = unpack_out(case.tensors.w_out.numpy(), bits)
        hidden = quant_matmul(case.x.numpy(), up, unpack_in(case.tensors.w_in.numpy(), bits, gated=False)[1].attributes())
        hidden = np.where(case.mask().numpy(), hidden, np.float32(0))
        assert 0 < case.mask().sum() < hidden.size
        assert_bits(run_native(case)["y"], quant_matmul(hidden, pack(down), down.attributes()))


@FAST
@given(data=st.data())
def test_bits_depend_on_neither_threads_nor_company_nor_instruction_set(data: st.DataObject) -> None:
    draw = data.draw
    rows = draw(st.integers(1, 40))
    wanted = attributes(
        draw(st.sampled_from(FORMATS)), gated=draw(st.booleans()), has_bias=draw(st.booleans()),
        rule=draw(st.sampled_from(RULES)), activation=draw(st.sampled_from(EXACT)),
    )  # fmt: skip
    case = make_case(
        wanted, shape=(1, rows), d=32 * draw(st.integers(1, 12)), f=32 * draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 1000)), clear=False,
    )  # fmt: skip
    first, other = (draw(st.sampled_from(list(NATIVE))).removeprefix("ort_") for _ in range(2))
    together = run_native(case, isa=first, threads=1)
    with instruction_set(other):
        several = session(make_model(case), library=ort_library_path(), threads=3)
    for name, value in run(several, case).items():
        np.testing.assert_array_equal(value, together[name], err_msg=name)
    for r in {0, rows // 2, rows - 1}:
        part = replace(case, x=case.x[:, r : r + 1].contiguous(), load=case.load[:, r : r + 1].contiguous())
        for name, value in run(several, part).items():
            np.testing.assert_array_equal(value[0, 0], together[name][0, r], err_msg=name)
    assert_bits(together["y"], case.eager()["y"])


def test_activations_have_the_same_bits_where_there_is_fma() -> None:
    for activation in ACTIVATIONS:
        case = make_case(attributes("int8", activation=activation), shape=(2, 5))
        found = [NATIVE[shell](case)["y"] for shell in NATIVE if shell != "ort_baseline"]
        for other in found[1:]:
            assert_bits(other, found[0])


def test_more_rows_than_a_pass_keeps() -> None:
    case = make_case(attributes("int4"), shape=(2, 270), d=64, f=64, clear=False)
    found, wanted = run_native(case, threads=2), case.eager()
    assert_bits(found["y"], wanted["y"])
    np.testing.assert_array_equal(found["active"], wanted["active"])


def test_weights_that_are_no_constants() -> None:
    case = make_case(attributes("int6"))
    for part in (("w_in",), ("w_out",), ("w_in", "w_out")):
        found = run(session(make_model(case, runtime_inputs=part), library=ort_library_path()), case, part)
        assert_bits(found["y"], case.eager()["y"])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bits", FORMAT_BITS.values())
def test_unpacking_gives_what_was_packed(bits: int, gated: bool) -> None:
    for d in (32, 96, 128, 160, 320):
        gate, up, down = matrices(bits, gated, d, 64, d)
        w_in, w_out = pack_in(gate, up), pack_out(down)
        shapes = weight_shapes(attributes(f"int{bits}", gated=gated), d, 64)
        assert (w_in.shape, w_out.shape) == (shapes["w_in"], shapes["w_out"])
        pairs = [*zip(unpack_in(w_in, bits, gated=gated), (gate, up), strict=True), (unpack_out(w_out, bits), down)]
        for found, wanted in pairs:
            assert (found is None) == (wanted is None)
            if found is not None and wanted is not None:
                np.testing.assert_array_equal(found.codes, wanted.codes)
                np.testing.assert_array_equal(found.scale, wanted.scale)


def refused(case: Case, *parts: str, **changes: object) -> None:
    with pytest.raises(Exception, match="SparseFFN node 'layer7/ffn'") as error:
        run(session(make_model(case, node_attributes=changes or None), library=ort_library_path()), case)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_what_is_refused() -> None:
    case = make_case(attributes("int4"))
    tensors = case.tensors

    def bad(*parts: str, **changes: torch.Tensor) -> None:
        refused(replace(case, tensors=replace(tensors, **changes)), *parts)

    bad("'w_in'", "[8, 3, 500]", "[f / 16, d / 32, 576]", "int4", w_in=tensors.w_in[..., :500].contiguous())
    bad("'w_in'", "[7, 3, 576]", "divisible by 32", w_in=tensors.w_in[:7])
    bad("'w_in'", "float32", "uint8", w_in=tensors.w_in.float())
    bad("'w_out'", "[3, 1728]", "[4, 1728]", w_out=tensors.w_out[:3])
    bad("'w_out'", "float32", "uint8", w_out=tensors.w_out.float())
    refused(replace(case, x=case.x[..., :95].contiguous()), "'x'", "[2, 5, 95]", "96")
    refused(replace(case, x=case.x.half()), "'x'", "float16", "float32")
    refused(case, "'w_in'", "[8, 3, 576]", "704", weight_format="int5")
    refused(case, "weight_format 'int4'", "granule 1", "granule 2", granule=2)
    with pytest.raises(ContractError, match="weight_format 'int4' has no statistic; use_stat is 0 and emit_stat 1"):
        attributes(emit_stat=True)
    refused(case, "'w_in'", "uint8", "float32 or float16 or bfloat16", weight_format="plain")
    for d, f in ((48, 64), (64, 48)):
        with pytest.raises(ContractError, match=rf"divisible by 32; they are {d} and {f}"):
            weight_shapes(attributes(), d, f)
    with pytest.raises(ContractError, match="wanted the same"):
        pack_in(matrices(4, True, 32, 64, 0)[0], matrices(5, True, 32, 64, 0)[1])
    assert input_names(attributes()) == ("x", "load", "w_in", "w_out", "threshold", "neuron_scale")
