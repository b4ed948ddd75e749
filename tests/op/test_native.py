"""What only the native kernel promises: equal bits for any thread count, rows on their own, odd sizes, clear errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_shells import Case, assert_same, available_isas, instruction_set, make_case, make_model, run, run_native, session

from clada_export.native.library import ort_library_path
from clada_export.op.reference import activate
from graph_passes.op import RULES, SCORES, SparseFFNAttributes

FAST = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def attributes(score: str, rule: str = "threshold", **changes: object) -> SparseFFNAttributes:
    stat = {"use_stat": True} if score == "prefix" else {}
    return SparseFFNAttributes(score=score, rule=rule, emit_active=True, **(stat | changes))


@settings(FAST, max_examples=120)
@given(data=st.data())
def test_bits_depend_on_neither_threads_nor_company(data: st.DataObject) -> None:
    """y and active of each row, alone, in a batch, on any number of threads; stat of each sequence.

    Up to 70 rows, dense, sparse and mixed, at sizes that blocks, panels and vectors divide, and that they do not.
    """
    draw = data.draw
    score = draw(st.sampled_from(SCORES), label="score")
    granule = draw(st.sampled_from([1, 1, 4, 70]), label="granule")
    d = draw(
        st.sampled_from([32, 64, 192, 288, 576]) if score == "shadow" else st.sampled_from([1, 17, 31, 33, 48, 64, 100, 192])
    )
    f = granule * draw(st.integers(1, 700 // granule), label="granules")
    sequence = draw(st.sampled_from([1, 3, 5, 6, 9, 16, 17, 35]), label="sequence")
    wanted = attributes(
        score,
        draw(st.sampled_from(RULES), label="rule"),
        granule=granule,
        gated=draw(st.booleans(), label="gated"),
        has_bias=draw(st.booleans(), label="bias"),
        emit_stat=True,
        stat_norm=draw(st.sampled_from(["row", "none"]), label="stat_norm"),
        load_slope=0.3,
    )
    loads = draw(st.sampled_from([[1.0], [0.0], [1.0, 0.0], [1.0, 1.0, 0.0, 2.0, 3.0]]), label="loads")
    values = torch.tensor([0.2, float("inf"), float("-inf"), float("nan")])
    kinds = torch.tensor(loads)[torch.randint(len(loads), (2, sequence), generator=torch.Generator().manual_seed(1))]
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), label="weights")
    case = make_case(
        wanted, shape=(2, sequence), d=d, f=f, dtype=dtype, x_dtype=draw(st.sampled_from([torch.float32, dtype])),
        load=values[kinds.long()], seed=draw(st.integers(0, 1000)), clear=False,
    )  # fmt: skip
    with instruction_set(draw(st.sampled_from(available_isas()))):
        one, three = (session(make_model(case), library=ort_library_path(), threads=threads) for threads in (1, 3))
    together = run(one, case)
    for name, value in run(three, case).items():
        np.testing.assert_array_equal(value, together[name], err_msg=f"{name}, three threads")

    def part(b: int, rows: slice) -> dict[str, np.ndarray]:
        at = (slice(b, b + 1), rows)
        cut = replace(
            case,
            x=case.x[at].contiguous(),
            load=case.load[at].contiguous(),
            score=None if case.score is None else case.score[at].contiguous(),
            past_stat=None if case.past_stat is None else case.past_stat[b : b + 1],
        )
        return run(one, cut)

    for b in range(2):
        np.testing.assert_array_equal(part(b, slice(None))["stat"][0], together["stat"][b], err_msg=f"stat, sequence {b}")
        for s in range(sequence):
            alone = part(b, slice(s, s + 1))
            for name in ("y", "active"):
                np.testing.assert_array_equal(alone[name][0, 0], together[name][b, s], err_msg=f"{name}, row {b}, {s}")


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows(shape: tuple[int, int]) -> None:
    case = make_case(attributes("gate", emit_stat=True), shape=shape, load=torch.zeros(shape))
    found = run_native(case)
    assert found["y"].shape == (*shape, 64) and found["active"].shape == shape
    np.testing.assert_array_equal(found["stat"], np.zeros((shape[0], 96), np.float32))


@pytest.mark.parametrize("rule", RULES)
def test_nan_scores_count_as_active(rule: str) -> None:
    case = make_case(attributes("external", rule), shape=(1, 2), load=torch.zeros(1, 2))
    assert case.score is not None
    score = case.score.clone()
    score[0, 0, 5] = float("nan")
    case = replace(case, score=score)
    assert_same(run_native(case), case.reference())
    assert bool(case.mask()[0, 0, 5])


def test_ties_go_to_the_lowest_index() -> None:
    case = make_case(attributes("external", "topk"), shape=(1, 3), load=torch.zeros(1, 3), threshold=torch.tensor([7.0]))
    case = replace(case, score=torch.full((1, 3, 96), 0.5))
    assert_same(run_native(case), case.reference())
    assert case.mask()[0, 0].nonzero().flatten().tolist() == list(range(7))


def test_nan_activations_are_kept_by_the_gate_score() -> None:
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"):
        case = make_case(attributes("gate", activation=activation), shape=(1, 1), load=torch.zeros(1, 1))
        x = case.x.clone()
        x[0, 0, 3] = float("nan")
        found = run_native(replace(case, x=x))
        assert found["active"][0, 0] == 96 and np.isnan(found["y"]).all()


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"])
def test_activation_accuracy(activation: str, isa: str) -> None:
    """One neuron a value: y is the diagonal, so the activation's own error is visible over its whole range."""
    values = torch.cat((torch.linspace(-30, 30, 4001), torch.tensor([-88.0, -100.0, 100.0, 1e-30, -1e-30, 0.0])))
    f = len(values)
    case = make_case(attributes("gate", activation=activation, gated=False), shape=(1, 1), d=1, f=8, load=torch.zeros(1, 1))
    tensors = replace(case.tensors, w_in=torch.ones(1, 1, 1), w_out=torch.ones(1, 1))
    case = replace(case, tensors=tensors, x=values.reshape(f, 1, 1), load=torch.full((f, 1), float("inf")))
    found = run_native(case, isa=isa)["y"].ravel()
    wanted = activate(activation, values.double()).numpy()  # float32 references cancel as much as the kernel does
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@FAST
@given(
    d=st.integers(1, 80),
    granules=st.integers(1, 40),
    granule=st.sampled_from([1, 2, 3, 70]),
    score=st.sampled_from(["gate", "exact", "prefix", "external"]),
    rule=st.sampled_from(RULES),
    gated=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    narrow_x=st.booleans(),
    isa=st.sampled_from(available_isas()),
    rows=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_any_size(
    d: int,
    granules: int,
    granule: int,
    score: str,
    rule: str,
    gated: bool,
    bias: bool,
    dtype: torch.dtype,
    narrow_x: bool,
    isa: str,
    rows: int,
    seed: int,
) -> None:
    wanted = attributes(score, rule, granule=granule, gated=gated, has_bias=bias, emit_stat=True)
    x_dtype = dtype if narrow_x else torch.float32
    case = make_case(wanted, shape=(1, rows), d=d, f=granule * granules, dtype=dtype, x_dtype=x_dtype, seed=seed)
    assert_same(run_native(case, isa=isa, threads=2), case.reference(), x_dtype)


@FAST
@given(score=st.sampled_from(["gate", "exact", "shadow", "external"]), rule=st.sampled_from(RULES), seed=st.integers(0, 1000))
def test_higher_load_never_drops_a_neuron(score: str, rule: str, seed: int) -> None:
    loads = torch.tensor([[-3.0, -1.0, 0.0, 0.5, 1.0, 4.0, float("inf")]])
    case = make_case(attributes(score, rule, load_slope=0.5), shape=(1, 7), load=loads, seed=seed)
    case = replace(case, x=case.x[:, :1].expand(1, 7, 64).contiguous())
    if case.score is not None:
        case = replace(case, score=case.score[:, :1].expand(1, 7, 96).contiguous())
    active = run_native(case)["active"][0]
    assert (np.diff(active) >= 0).all() and active[-1] == 96


def _expect(case: Case, *parts: str, runtime: tuple[str, ...] = (), **changes: object) -> None:
    """The error names the node, the input, the value found and the value wanted."""
    with pytest.raises(Exception) as error:
        made = session(make_model(case, runtime_inputs=runtime, node_attributes=changes or None), library=ort_library_path())
        run(made, case, runtime)
    for part in ("layer7/ffn", *parts):
        assert part in str(error.value), str(error.value)


def test_bad_inputs() -> None:
    stat = attributes("shadow", use_stat=True, has_bias=True)
    case = make_case(stat)
    tensors, inf = case.tensors, float("inf")

    def bad(*parts: str, runtime: tuple[str, ...] = (), base: Case = case, **changes: torch.Tensor) -> None:
        _expect(replace(base, tensors=replace(base.tensors, **changes)), *parts, runtime=runtime)

    assert tensors.shadow is not None and tensors.shadow_scale is not None and tensors.neuron_scale is not None
    bad("'w_in'", "[96, 1, 64]", "[f, 2, d]", w_in=tensors.w_in[:, :1])
    bad("'w_in'", "[96, 128]", "[f, 2, d]", w_in=tensors.w_in.flatten(1))
    bad("'w_out'", "[95, 64]", "[96, 64]", w_out=tensors.w_out[:95])
    bad("'w_out'", "float16", "float32", w_out=tensors.w_out.half())
    bad("'x'", "[2, 5, 64]", "32", w_in=tensors.w_in[..., :32])
    bad("'threshold'", "[2]", "[1] or [96]", threshold=torch.ones(2))
    bad("'threshold'", "-1", "at least 0", threshold=torch.tensor([-1.0]))
    bad("'threshold'", "nan", "at least 0", threshold=torch.tensor([float("nan")]))
    bad("'threshold'", "-2", "at least 0", threshold=torch.tensor([-2.0]), runtime=("threshold",))
    bad("'neuron_scale'", "[95]", "[96]", neuron_scale=tensors.neuron_scale[:95])
    bad("'shadow'", "[96, 2, 16]", "[96, 2, 32]", shadow=tensors.shadow[..., :16])
    bad("'shadow'", "float32", "int8", shadow=tensors.shadow.float())
    bad("'shadow_scale'", "[96, 2, 1, 2]", "[96, 2, 2, 2]", shadow_scale=tensors.shadow_scale[:, :, :1])
    bad("'shadow_scale'", "float32", "float16", shadow_scale=tensors.shadow_scale.float())
    bad("'gate_bias'", "[1]", "[96]", gate_bias=torch.ones(1))
    bad("'up_bias'", "[1]", "[96]", up_bias=torch.ones(1))
    bad("'down_bias'", "[96]", "[64]", down_bias=torch.ones(96))
    assert case.past_stat is not None
    _expect(replace(case, past_stat=case.past_stat[:1]), "'past_stat'", "[1, 96]", "[2, 96]")
    _expect(replace(case, load=torch.full((5, 2), inf)), "'load'", "[5, 2]", "[2, 5]")
    _expect(replace(case, x=case.x.half()), "'x'", "float16", "float32")
    narrow = make_case(attributes("gate"), dtype=torch.float16)
    _expect(replace(narrow, x=narrow.x.bfloat16()), "'x'", "bfloat16", "float32 or float16")
    _expect(replace(case, x=case.x[0], load=case.load[0]), "'x'", "[5, 64]", "[B, S, d]")
    odd = make_case(attributes("gate"), d=40)
    wide = replace(case, tensors=replace(tensors, w_in=odd.tensors.w_in, w_out=odd.tensors.w_out), x=odd.x)
    _expect(wide, "'w_in'", "[96, 2, 40]", "divisible by 32")
    external = make_case(attributes("external"))
    assert external.score is not None
    _expect(replace(external, score=external.score[..., :5]), "'score'", "[2, 5, 5]", "[2, 5, 96]")
    topk = make_case(attributes("gate", "topk"))
    _expect(replace(topk, tensors=replace(topk.tensors, threshold=torch.ones(96))), "'threshold'", "[96]", "[1]")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"activation": "swish"}, ("'activation'", "'swish'", "silu, gelu")),
        ({"score": "magic"}, ("'score'", "'magic'", "gate, exact")),
        ({"rule": "best"}, ("'rule'", "'best'", "threshold, relative, topk")),
        ({"combine": "weighted"}, ("weighted", "external", "gate")),
        ({"stat_norm": "column"}, ("'stat_norm'", "'column'", "row, none")),
        ({"weight_format": "int3"}, ("'weight_format'", "'int3'", "plain, int4")),
        ({"weight_format": "int4"}, ("weight_format 'int4'", "score 'exact'", "score is 'gate'")),
        ({"gated": 2}, ("'gated'", "2", "0, 1")),
        ({"granule": 0}, ("'granule'", "0", "at least 1")),
        ({"granule": 5}, ("96 neurons", "granule 5")),
        ({"load_min": 5.0}, ("load_min is 5", "load_max is 4")),
        ({"load_slope": float("nan")}, ("'load_slope'", "nan", "finite")),
        ({"load_slope": 1}, ("'load_slope'", "an int", "a float")),
        ({"granule": 1.0}, ("'granule'", "a float", "an int")),
        ({"score": 1}, ("'score'", "an int", "a string")),
        ({"prior_gamma": 0.5}, ("prior_gamma", "use_stat = 1")),
        ({"has_bias": 1}, ("5 inputs", "8", "gate_bias")),
        ({"emit_stat": 1}, ("1 outputs", "2")),
    ],
)
def test_bad_attributes(changes: dict[str, object], parts: tuple[str, ...]) -> None:
    _expect(make_case(SparseFFNAttributes()), *parts, **changes)


def test_unknown_instruction_set() -> None:
    case = make_case(SparseFFNAttributes())
    with instruction_set("mmx"), pytest.raises(Exception, match=r"layer7/ffn.*'mmx'.*avxvnni, avx2 or baseline"):
        session(make_model(case), library=ort_library_path())


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        (b"\xff\xfe", r"\xff\xfe"),
        (b"a\x1b[31m", r"a\x1b[31m"),
        ("gr\u00fcn \U0001d11e".encode(), "gr\u00fcn \U0001d11e"),
        (b"\xed\xa0\x80\xc2\x9b", r"\xed\xa0\x80\xc2\x9b"),
    ],
)
def test_a_message_is_printable_utf8(found: bytes, shown: str) -> None:
    model = make_model(make_case(SparseFFNAttributes()), node_attributes={"activation": found})
    with pytest.raises(Exception, match="layer7/ffn") as error:
        session(model, library=ort_library_path())
    assert f"'activation' is '{shown}'" in str(error.value)
