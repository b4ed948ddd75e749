"""What the CUDA kernels promise beyond the contract's numbers: the same bits in any company, any size, limits that are named.

They run on the emulated runtime, or on a GPU when `CLADA_CUDA_KERNELS` names a library that was built for one. The contract's
own cases run through the plugin (`test_plugin.py`).
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from emulation import emulation_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from op_shells import Case, make_case

from benchmarks.cuda_kernels import Call, CudaKernels
from graph_passes.op import SparseFFNAttributes, input_names

ON_GPU = "CLADA_CUDA_KERNELS" in os.environ
# Half a unit in the last place of a type's significand: what a number may move when it is rounded.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@functools.cache
def kernels() -> CudaKernels:
    given_ = os.environ.get("CLADA_CUDA_KERNELS")
    return CudaKernels(Path(given_) if given_ else emulation_folder() / "plugins" / "libclada_cuda_kernels.so")


def make_call(case: Case) -> Call:
    device = "cuda" if ON_GPU else "cpu"
    tensors = {name: case.input(name).contiguous().to(device) for name in input_names(case.attributes)}
    return kernels().call(case.attributes, tensors)


def run(case: Case) -> Call:
    call = make_call(case)
    workspace = kernels().workspace([call], call.y.device)
    workspace.fill_(255)  # as float32, NaN: what is read before it is written shows
    kernels().run(call, workspace)
    if ON_GPU:
        torch.cuda.synchronize()
    return call


def bound(case: Case) -> np.ndarray:
    """How far y may lie from the reference, by element: what rounding x and h to the weights' type (prompts) and y to its own
    can do. Sums are in float32 and add little: a term of the same form with float32's unit, times the square root of their
    length."""
    t, x = case.tensors, case.x.float()
    sums = 4 * ROUNDING[torch.float32] * max(x.shape[-1], t.w_in.shape[0]) ** 0.5
    prompt = x.shape[0] * x.shape[1] > 16
    unit = sums + (2 * ROUNDING[t.w_in.dtype] if prompt else 0.0)
    products = torch.einsum("...d,fnd->...fn", x, t.w_in.float())
    magnitudes = torch.einsum("...d,fnd->...fn", x.abs(), t.w_in.float().abs())
    slope = 1.1  # the steepest that silu and gelu get
    if case.attributes.gated:
        gate, up = products.abs().unbind(-1)
        gate_size, up_size = magnitudes.unbind(-1)
        moved = unit * (slope * gate_size * up + gate * up_size + gate * up)
    else:
        moved = unit * (slope * magnitudes[..., 0] + products[..., 0].abs())
    wanted = torch.from_numpy(case.reference()["y"].astype(np.float32)).reshape(x.shape)
    found = moved @ t.w_out.float().abs() + ROUNDING[case.x.dtype] * 2 * wanted.abs() + 1e-6
    return np.asarray(found.numpy())


def assert_close(case: Case, call: Call) -> None:
    reference = case.reference()
    y = call.y.float().cpu().numpy()
    difference = np.abs(y - reference["y"].astype(np.float32).reshape(y.shape))
    assert (difference <= bound(case)).all(), (difference / bound(case)).max()
    if case.attributes.emit_active:
        np.testing.assert_array_equal(call.active.cpu().numpy(), reference["active"])


@settings(max_examples=200 if ON_GPU else 10)
@given(data=st.data())
def test_any_size(data: st.DataObject) -> None:
    draw = data.draw
    score = draw(st.sampled_from(["gate", "exact", "shadow", "prefix", "external"]), label="score")
    granule = draw(st.sampled_from([1, 3, 8, 40]), label="granule")
    d = 32 * draw(st.integers(1, 9)) if score == "shadow" else draw(st.integers(1, 300), label="d")
    f = granule * draw(st.integers(1, 200 // granule), label="granules")
    shape = draw(st.sampled_from([(1, 1), (2, 1), (1, 5), (3, 3), (16, 1), (2, 9), (1, 33)]), label="shape")
    dtype = draw(st.sampled_from(list(ROUNDING)), label="weights")
    attributes = SparseFFNAttributes(
        score=score,
        rule=draw(st.sampled_from(["threshold", "relative", "topk"]), label="rule"),
        granule=granule,
        activation=draw(st.sampled_from(["silu", "gelu", "relu"]), label="activation"),
        gated=draw(st.booleans(), label="gated"),
        use_stat=score == "prefix",
        emit_active=True,
        load_slope=0.3,
    )
    # Prompts round x to the weights' type, which may move a choice: there every row is dense.
    load = torch.full(shape, float("inf")) if shape[0] * shape[1] > 16 else None
    x_dtype = draw(st.sampled_from([torch.float32, dtype]), label="x")
    case = make_case(attributes, shape=shape, d=d, f=f, dtype=dtype, x_dtype=x_dtype, load=load)
    assert_close(case, run(case))


@pytest.mark.parametrize("score", ["shadow", "exact", "external"])
@pytest.mark.parametrize("rule", ["threshold", "topk"])
def test_a_row_has_the_same_bits_in_any_company(score: str, rule: str) -> None:
    attributes = SparseFFNAttributes(score=score, rule=rule, emit_active=True)
    case = make_case(attributes, shape=(16, 1), d=576, f=300, dtype=torch.float16, x_dtype=torch.float16)
    together = run(case)
    for rows in ([0], [3, 2], [0, 5, 7, 9, 15, 1]):
        alone = replace(case, x=case.x[rows], load=case.load[rows], score=None if case.score is None else case.score[rows])
        found = run(alone)
        assert torch.equal(found.y, together.y[rows])
        assert torch.equal(found.active, together.active[rows])


def test_the_same_call_gives_the_same_bits_whatever_ran_before() -> None:
    for shape in ((2, 2), (2, 20)):
        attributes = SparseFFNAttributes(score="gate", rule="relative", emit_active=True, emit_stat=True)
        case = make_case(attributes, shape=shape, dtype=torch.bfloat16, x_dtype=torch.bfloat16)
        first, other = run(case), run(make_case(attributes, shape=shape, seed=9))
        again = run(case)
        assert torch.equal(first.y, again.y) and torch.equal(first.tensors["stat"], again.tensors["stat"])
        assert not torch.equal(first.y.float(), other.y.float())


def test_what_is_off_is_not_read_into_the_result() -> None:
    """An inactive neuron's weights may be anything: infinite, or not a number."""
    case = make_case(SparseFFNAttributes(score="external", emit_active=True), shape=(1, 4), load=torch.zeros(1, 4))
    off = ~case.mask().any(dim=(0, 1))
    assert bool(off.any())
    clean = run(case)
    for poison in (float("inf"), float("nan")):
        w_in, w_out = case.tensors.w_in.clone(), case.tensors.w_out.clone()
        w_in[off], w_out[off] = poison, poison
        assert torch.equal(run(replace(case, tensors=replace(case.tensors, w_in=w_in, w_out=w_out))).y, clean.y)


def test_long_prompts_run_in_panels() -> None:
    """Rows beyond a panel, which the scratch memory bounds: its size stops growing, and results stay right."""
    attributes = SparseFFNAttributes(emit_active=True, emit_stat=True)
    sizes = []
    for rows in (64, 4096, 1 << 20):
        case = make_case(attributes, shape=(1, 1), d=4096, f=8, load=torch.full((1, 1), float("inf")))
        call = make_call(case)
        call.problem.sequence, call.problem.intermediate_size = rows, 11008
        sizes.append(kernels().workspace([call], torch.device("cpu")).numel())
    assert sizes[0] < sizes[1] == sizes[2] < 256 << 20


def test_a_very_long_prompt_of_a_small_layer() -> None:
    """More rows than a launch has blocks along its second axis: panels are bounded by that too."""
    case = make_case(SparseFFNAttributes(emit_active=True), shape=(1, 1), d=2, f=2, load=torch.full((1, 1), float("inf")))
    rows = 70_000 if ON_GPU else 33_000
    long = replace(case, x=torch.randn(1, rows, 2), load=torch.full((1, rows), float("inf")))
    assert_close(long, run(long))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"hidden_size": 1 << 30}, ("n * hidden_size", "2147483648")),
        ({"intermediate_size": 1 << 30}, ("n * intermediate_size", "2147483648")),
        ({"batch": 70_000}, ("batch", "70000", "65535")),
        ({"batch": 60_000, "sequence": 60_000}, ("batch * sequence", "3600000000")),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes: dict[str, int], said: tuple[str, ...]) -> None:
    call = make_call(make_case(SparseFFNAttributes(), shape=(1, 1)))
    for name, value in sizes.items():
        setattr(call.problem, name, value)
    with pytest.raises(RuntimeError) as error:
        kernels().run(call, torch.empty(512, dtype=torch.uint8, device=call.y.device))
    for part in said:
        assert part in str(error.value)
