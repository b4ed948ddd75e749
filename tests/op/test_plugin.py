"""The TensorRT plugin and ONNX Runtime's CUDA op give the reference's numbers, and say what is wrong with a bad node.

Without a GPU both run on the emulated CUDA runtime. `CLADA_PLUGIN_CONFORMANCE` (the program) and `CLADA_TRT_LIBRARY` choose
builds for a real one.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quant_shells
import test_contract
import torch
import yaml
from emulation import emulation_folder, plugin_program
from op_shells import Case, assert_same, make_case, make_model, run, session, to_numpy
from plugin_harness import NODE, PluginCase, PluginResult, conformance_program, plugin_fields, run_plugin_cases

from clada_export.native.library import trt_library_path
from graph_passes.op import DOMAIN, OP_TYPE, OP_VERSION, SCORES, SparseFFNAttributes

DECODE_ROWS = 16  # kDecodeRows of clada/sparse_ffn_cuda.h
# The emulation takes half a minute for the cases of one contract test: of more than MANY, a plain run takes one in ONE_IN. That
# number divides the length of no axis of the suite, so that none of the values stays away.
MANY, ONE_IN = 100, 7
CONTRACT_TESTS = [name for name in vars(test_contract) if name.startswith("test_")]


@functools.cache
def program_and_library() -> tuple[Path, Path]:
    given = conformance_program()
    if given is not None:
        return given, trt_library_path()
    return plugin_program(emulation_folder())


def run_cases(*cases: Case | PluginCase) -> list[PluginResult]:
    return run_plugin_cases(cases, *program_and_library())


@functools.cache
def contract_cases(name: str) -> tuple[Case, ...]:
    """The cases that a test of the contract suite makes, over all its parameters."""
    test = getattr(test_contract, name)
    axes = {mark.args[0]: mark.args[1] for mark in test.pytestmark if mark.name == "parametrize"} | {"shell": ["plugin"]}
    cases: list[Case] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_contract, "check", lambda shell, **settings: cases.append(make_case(**settings)))
        for values in itertools.product(*axes.values()):
            test(**dict(zip(axes, values, strict=True)))
    return tuple(cases)


def assert_close(found: dict[str, np.ndarray], case: Case) -> None:
    """As `assert_same`, and for what a prompt's GEMMs round.

    They multiply in the weights' type: x and the hidden values are rounded to it, each within half an eps. Such errors are
    independent, so that of a y has a standard deviation of about 0.6 eps times y's size; the largest of 10^4 values stays below
    5 times that, and rounding y itself adds less than 2.
    """
    wanted, weight_type = case.reference(), case.tensors.w_in.dtype
    if case.load.numel() <= DECODE_ROWS or weight_type == torch.float32:
        assert_same(found, wanted, case.x.dtype)
        return
    assert found.keys() == wanted.keys() and found["y"].dtype == to_numpy(torch.empty(0, dtype=case.x.dtype)).dtype
    eps, size = torch.finfo(weight_type).eps, float(np.sqrt(np.mean(wanted["y"] ** 2)))
    np.testing.assert_allclose(found["y"].astype(np.float32), wanted["y"], rtol=0, atol=5 * eps * size)
    if "stat" in wanted:
        np.testing.assert_allclose(found["stat"], wanted["stat"], rtol=0, atol=eps * float(wanted["stat"].max()))
    if "active" in wanted:
        np.testing.assert_array_equal(found["active"], wanted["active"])


def assert_good(case: Case, result: PluginResult) -> None:
    assert not result.failed and not result.log, f"{result.failed}: {result.message} {result.log} {case.attributes}"
    assert_close(result.outputs, case)


def some(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """All cases where they are few, else one in so many."""
    return cases[::ONE_IN] if len(cases) > MANY else cases


@pytest.mark.parametrize("take", [some, pytest.param(tuple, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", CONTRACT_TESTS)
def test_the_plugin_keeps_the_contract(name: str, take: Callable[[tuple[Case, ...]], tuple[Case, ...]]) -> None:
    cases = contract_cases(name)
    # A GPU has time for all; slow programs (compute-sanitizer) run each case in so many.
    stride = int(os.environ.get("CLADA_CONFORMANCE_STRIDE", "1"))
    cases = take(cases) if conformance_program() is None else cases[::stride]
    assert cases
    for case, result in zip(cases, run_cases(*cases), strict=True):
        assert_good(case, result)


@pytest.mark.parametrize("name", CONTRACT_TESTS)
def test_some_cases_have_every_value_of_every_attribute(name: str) -> None:
    def values(cases: tuple[Case, ...]) -> set[tuple[str, object]]:
        types = {("types", (case.x.dtype, case.tensors.w_in.dtype)) for case in cases}
        return types | {item for case in cases for item in case.attributes.to_onnx().items()}

    assert values(some(contract_cases(name))) == values(contract_cases(name))


@pytest.mark.parametrize("name", CONTRACT_TESTS)
def test_the_cuda_op_of_onnx_runtime_keeps_the_contract(name: str) -> None:
    """Under emulation the op stands in for the CPU's, so that a runtime without CUDA runs it."""
    library = emulation_folder() / "plugins" / "libclada_ort_cuda.so"
    for case in contract_cases(name)[::5]:
        assert_close(run(session(make_model(case), library=library), case), case)


def test_the_cuda_provider_has_no_quant_matmul_and_says_so() -> None:
    library = emulation_folder() / "plugins" / "libclada_ort_cuda.so"
    with pytest.raises(Exception, match=r"QuantMatMul node 'layer7/q_proj': there is no CUDA kernel"):
        session(quant_shells.make_model(quant_shells.make_case()), library=library)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows(shape: tuple[int, int]) -> None:
    plain = make_case(SparseFFNAttributes(emit_stat=True, emit_active=True), shape=shape, load=torch.zeros(shape))
    continued = SparseFFNAttributes(score="prefix", use_stat=True, emit_stat=True, emit_active=True)
    prior = make_case(continued, shape=shape, load=torch.zeros(shape))
    for case, result in zip((plain, prior), run_cases(plain, prior), strict=True):
        assert not result.failed, result.message
        assert result.outputs["y"].shape == (*shape, 64) and result.outputs["active"].shape == shape
        stat = torch.zeros(shape[0], 96) if case.past_stat is None else case.past_stat
        np.testing.assert_array_equal(result.outputs["stat"], stat.numpy())


def test_the_fields_are_the_contract_s_attributes() -> None:
    contract: dict[str, Any] = yaml.safe_load(
        (Path(__file__).parents[2] / "plugins" / "sparse_ffn.yaml").read_text(encoding="utf-8")
    )
    creator, fields = plugin_fields(*program_and_library())
    assert creator == (contract["name"], str(contract["version"]), contract["domain"])
    assert fields == {entry["name"]: entry["type"] for entry in contract["attributes"]}


def test_absent_fields_have_their_defaults() -> None:
    case = make_case(SparseFFNAttributes())
    (result,) = run_cases(replace(PluginCase.of(case), fields={}))
    assert_good(case, result)


def expect(step: str, *parts: str, base: PluginCase, inputs: dict[str, torch.Tensor] | None = None, **fields: Any) -> None:
    changed = replace(base, fields={**base.fields, **fields}, inputs={**base.inputs, **(inputs or {})})
    (result,) = run_cases(changed)
    assert result.failed == step, f"{result.failed}: {result.message}"
    assert len(result.log) == 1
    for part in (NODE, *parts):
        assert part in result.log[0], result.log[0]


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"activation": "swish"}, ("'activation'", "'swish'", "silu, gelu")),
        ({"score": "magic"}, ("'score'", "'magic'", "gate, exact")),
        ({"stat_norm": "column"}, ("'stat_norm'", "'column'", "row, none")),
        ({"weight_format": "int3"}, ("'weight_format'", "'int3'", "plain, int4")),
        ({"weight_format": "int4"}, ("weight_format 'int4'", "score 'exact'", "score is 'gate'")),
        ({"weight_format": "int5", "score": "exact"}, ("'weight_format'", "'int5'", "no CUDA kernel", "plain weights")),
        ({"gated": 2}, ("'gated'", "2", "0, 1")),
        ({"gated": [1, 1]}, ("'gated'", "2 values", "1")),
        ({"granule": 0}, ("'granule'", "0", "at least 1")),
        ({"load_min": 5.0}, ("load_min is 5", "load_max is 4")),
        ({"load_slope": float("nan")}, ("'load_slope'", "nan", "finite")),
        ({"load_slope": 1}, ("'load_slope'", "an int32", "a float32")),
        ({"granule": 1.0}, ("'granule'", "a float32", "an int32")),
        ({"score": 1}, ("'score'", "an int32", "a string")),
        ({"prior_gamma": 0.5}, ("prior_gamma", "use_stat = 1")),
        ({"treshold": 0.5}, ("'treshold'", "unknown", "activation, gated")),
        ({"plugin_version": "2"}, ("'plugin_version'", "'2'", "'1'")),
        ({"plugin_namespace": "elsewhere"}, ("'plugin_namespace'", "'elsewhere'", "'com.clada'")),
    ],
)
def test_bad_attributes(fields: dict[str, Any], parts: tuple[str, ...]) -> None:
    expect("create", *parts, base=PluginCase.of(make_case(SparseFFNAttributes())), **fields)


def test_bad_inputs() -> None:
    case = make_case(SparseFFNAttributes(score="shadow", use_stat=True, has_bias=True))
    base, get = PluginCase.of(case), case.input
    expect("types", "5 inputs", "8", "gate_bias", base=PluginCase.of(make_case(SparseFFNAttributes())), has_bias=1)
    for name, value, wanted in (
        ("load", get("load").half(), "float32"),
        ("x", get("x").to(torch.int32), "float32 or float16 or bfloat16"),
        ("w_out", get("w_out").half(), "float32"),
        ("shadow", get("shadow").float(), "int8"),
        ("shadow_scale", get("shadow_scale").float(), "float16"),
    ):
        found = str(value.dtype).removeprefix("torch.")
        expect("types", f"'{name}'", found, f"wanted {wanted}", base=base, inputs={name: value})
    expect("types", "'w_in'", "float32", "float16", base=base, inputs={"x": get("x").half()})
    expect("shapes", "'w_in'", "rank 2", "[f, n, d]", base=base, inputs={"w_in": get("w_in").flatten(1)})
    for name, value, parts in (
        ("w_in", get("w_in")[:, :1], ("[96, 1, 64]", "[f, 2, d]")),
        ("w_out", get("w_out")[:95], ("[95, 64]", "[96, 64]")),
        ("threshold", torch.ones(2), ("[2]", "[1] or [96]")),
        ("neuron_scale", torch.ones(95), ("[95]", "[96]")),
        ("shadow", get("shadow")[..., :16], ("[96, 2, 16]", "[96, 2, 32]")),
        ("up_bias", torch.ones(1), ("[1]", "[96]")),
    ):
        expect("configure", f"'{name}'", *parts, base=base, inputs={name: value})
    # Open sizes that disagree show only when a call has them; the program starts with 2 n + 1 where the case has n.
    expect("shape_change", "'load'", "[5, 9]", "[5, 11]", base=base, inputs={"load": get("load")[:, :4]})
    expect("shape_change", "'past_stat'", "[3, 96]", "[5, 96]", base=base, inputs={"past_stat": get("past_stat")[:1]})
    expect("configure", "96 neurons", "granule 5", base=PluginCase.of(make_case(SparseFFNAttributes())), granule=5)


@pytest.mark.parametrize(("launch", "step"), [(1, "statistic"), (2, "x"), (4, "neurons"), (5, "sum"), (6, "energy")])
def test_a_failing_device_is_told(launch: int, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside of enqueue: no crash, the step and CUDA's name for it in the log."""
    if conformance_program() is not None:
        pytest.skip("only the emulated CUDA runtime fails when it is told to")
    monkeypatch.setenv("CLADA_EMULATION_FAILS_AT", str(launch))
    (result,) = run_cases(make_case(SparseFFNAttributes(emit_stat=True)))
    assert result.failed == "enqueue"
    assert f"{step}: cudaErrorLaunchFailure" in result.log[0], result.log
    assert NODE in result.log[0]


@pytest.mark.parametrize("creator", [("SparseFFM", "1", DOMAIN), (OP_TYPE, "2", DOMAIN), (OP_TYPE, "1", "none")])
def test_other_creators_are_not_there(creator: tuple[str, str, str]) -> None:
    (result,) = run_cases(replace(PluginCase.of(make_case(SparseFFNAttributes())), creator=creator))
    assert result.failed == "creator"
    assert f"{DOMAIN}::{OP_TYPE} version {OP_VERSION}" in result.message


def test_every_score_is_among_the_cases() -> None:
    found = {case.attributes.score for name in CONTRACT_TESTS for case in contract_cases(name)}
    assert found == set(SCORES)
