"""Nodes of the op, right and wrong, through ONNX Runtime: right ones give the reference's numbers, wrong ones an error that
names the node. What crashes takes the test's process with it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from harness import fuzz
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper
from torch import Tensor

from clada_export.native.library import ort_library_path
from clada_export.op.reference import SparseFFNTensors, activate, check_inputs, neuron_outputs, quantize_shadow
from graph_passes.op import (
    ACTIVATIONS,
    COMBINES,
    DOMAIN,
    OP_TYPE,
    RULES,
    SCORES,
    STAT_NORMS,
    ContractError,
    SparseFFNAttributes,
    input_names,
    output_names,
)

sys.path.append(str(Path(__file__).parents[1] / "op"))
from op_shells import ONNX_TYPES, Case, available_isas, instruction_set, make_case, run_function, tensor_proto, to_numpy

NODE = "layer7/ffn"
INF, NAN = float("inf"), float("nan")
TYPES = {value: key for key, value in ONNX_TYPES.items()}
# Types that no input has, for wrong ones.
_OTHERS = ("DOUBLE", "INT32", "INT64", "UINT8", "BOOL", "STRING")
OTHER_TYPES = tuple(getattr(TensorProto, name) for name in _OTHERS)


@dataclass
class Node:
    """What a model of one node says of it. `inputs` are by the names that the node gives them; "" is one that is left out."""

    attributes: dict[str, Any]
    input_names: list[str]
    output_names: list[str]
    inputs: dict[str, Tensor]
    constants: set[str]
    types: dict[str, int] = field(default_factory=dict)
    """Element types of inputs that are not what their tensors are: the values are then zeros of that type."""
    isa: str = ""
    threads: int = 1

    def model(self) -> onnx.ModelProto:
        infos, initializers = [], []
        for name in dict.fromkeys(self.input_names):
            if not name:
                continue
            value, kind = self.inputs[name], self.types.get(name)
            if name in self.constants and kind is None:
                initializers.append(tensor_proto(name, value))
            else:
                axes = [f"{name}_{i}" for i in range(value.dim())]
                infos.append(helper.make_tensor_value_info(name, kind or ONNX_TYPES[value.dtype], axes))
        node = helper.make_node(OP_TYPE, self.input_names, self.output_names, domain=DOMAIN, name=NODE)
        for name, value in self.attributes.items():
            node.attribute.append(value if isinstance(value, AttributeProto) else helper.make_attribute(name, value))
        outputs = [helper.make_empty_tensor_value_info(name) for name in self.output_names if name]
        return helper.make_model(
            helper.make_graph([node], "one", infos, outputs, initializers),
            opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)],
            ir_version=10,
        )

    def feeds(self, model: onnx.ModelProto) -> dict[str, ort.OrtValue | np.ndarray]:
        values: dict[str, ort.OrtValue | np.ndarray] = {}
        for info in model.graph.input:
            value, kind = self.inputs[info.name], self.types.get(info.name)
            if kind is not None:
                array = np.zeros(tuple(value.shape), helper.tensor_dtype_to_np_dtype(kind))
                values[info.name] = array.astype(str) if kind == TensorProto.STRING else ort.OrtValue.ortvalue_from_numpy(array)
            elif value.dtype == torch.bfloat16:
                bits = to_numpy(value.contiguous()).view(np.uint16)
                values[info.name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
            else:
                values[info.name] = ort.OrtValue.ortvalue_from_numpy(to_numpy(value.contiguous()))
        return values

    def run(self) -> list[np.ndarray]:
        """The outputs, in their order.

        Raises:
            Exception: whatever ONNX Runtime says.
        """
        model = self.model()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self.threads
        options.register_custom_ops_library(str(ort_library_path()))
        with instruction_set(self.isa):
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        run_options = ort.RunOptions()
        run_options.log_severity_level = 4
        names = [name for name in self.output_names if name]
        feeds = self.feeds(model)
        if TensorProto.STRING in self.types.values():  # the one type of which Python makes no `OrtValue`
            return session.run(names, feeds, run_options)
        found = session.run_with_ort_values(names, feeds, run_options)
        return [to_numpy(torch.from_dlpack(each._ortvalue.to_dlpack())) for each in found]

    def case(self) -> Case | None:
        """The call that this is; None for one that the contract does not allow."""
        try:
            attributes = _attributes(self.attributes)
        except ContractError:
            return None
        names = input_names(attributes)
        if len(self.input_names) != len(names) or len(self.output_names) != len(output_names(attributes)):
            return None
        if not all(self.input_names) or not all(self.output_names):
            return None
        values = {}
        for name, own in zip(names, self.input_names, strict=True):
            if own in self.types:
                return None
            values[name] = self.inputs[own]
            wanted = {"shadow": torch.int8, "shadow_scale": torch.float16}.get(name, torch.float32)
            if name not in ("x", "w_in", "w_out") and values[name].dtype != wanted:
                return None
        known = {each.name for each in fields(SparseFFNTensors)}
        tensors = SparseFFNTensors(**{name: value for name, value in values.items() if name in known})
        case = Case(attributes, tensors, values["x"], values["load"], values.get("score"), values.get("past_stat"))
        try:
            check_inputs(case.x, case.load, tensors, attributes, score=case.score, past_stat=case.past_stat)
        except (ContractError, IndexError):
            return None
        return case


def _attributes(found: Mapping[str, Any]) -> SparseFFNAttributes:
    """As a node stores them: of the types that they have, and floats as float32.

    Raises:
        ContractError: something else.
    """
    defaults = SparseFFNAttributes()
    for name, value in found.items():
        if not hasattr(defaults, name):
            continue
        default = getattr(defaults, name)
        kind = int if isinstance(default, bool) else type(default)
        if type(value) is not kind or (isinstance(default, bool) and value not in (0, 1)):
            raise ContractError(f"{name} is {value!r}")
        if kind is float and np.float32(value) != value and not np.isnan(value):
            raise AssertionError(f"{name} is {value!r}: draw floats that are float32")
    return SparseFFNAttributes.from_onnx(found)


def of(case: Case) -> Node:
    """The node of a call, its weights constant."""
    names = list(input_names(case.attributes))
    constant = {name for name in names if name not in ("x", "load", "score", "past_stat")}
    inputs = {name: case.input(name) for name in names}
    return Node(case.attributes.to_onnx(), names, list(output_names(case.attributes)), inputs, constant)


# What well-formed calls must give


def assert_agrees(case: Case, found: Mapping[str, np.ndarray]) -> None:
    """Compare with the reference, as closely as sums in another order allow.

    Rows whose choice hangs on rounding are left out; rows of x that are not finite mean nothing.
    """
    wanted, d = case.reference(), case.x.shape[-1]
    finite = case.x.float().isfinite().all(-1)
    dense = ~case.load.isfinite()
    rows = (finite & (dense | sure_rows(case))).reshape(-1).numpy()
    y_tolerance, share_tolerance = tolerances(case)
    for name, value in wanted.items():
        assert found[name].shape == value.shape, f"{name}: {found[name].shape}, wanted {value.shape}"
    y = found["y"].astype(np.float32).reshape(rows.size, d)[rows]
    expected = wanted["y"].astype(np.float32).reshape(rows.size, d)[rows]
    # An infinity among what is summed leaves an infinity or a NaN, by the order of the sum.
    lost = ~np.isfinite(expected)
    with np.errstate(invalid="ignore"):
        allowed = y_tolerance.reshape(rows.size, d)[rows]
        close = np.abs(y - expected) <= allowed
        # Where y's type ends, one side can round to infinity.
        ended = (np.abs(expected) + allowed >= torch.finfo(case.x.dtype).max) & (np.sign(y) == np.sign(expected))
        close |= np.isinf(y) & ended
    wrong = ~(lost | ~np.isfinite(allowed) | close | (y == expected))
    assert not wrong.any(), f"y: {y[wrong]}, wanted {expected[wrong]} within {allowed[wrong]}"
    if case.attributes.emit_active:
        np.testing.assert_array_equal(found["active"].reshape(-1)[rows], wanted["active"].reshape(-1)[rows], "active")
    if case.attributes.emit_stat:
        counted = case.load == INF
        usable = (finite | ~counted).all(-1).numpy()
        with np.errstate(invalid="ignore"):
            same = np.abs(found["stat"] - wanted["stat"]) <= share_tolerance + 1e-6 * np.abs(wanted["stat"])
        same |= (np.isnan(found["stat"]) & np.isnan(wanted["stat"])) | (found["stat"] == wanted["stat"])
        wrong = usable[:, None] & ~same
        wanted_stat, allowed = wanted["stat"][wrong], share_tolerance[wrong]
        assert not wrong.any(), f"stat: {found['stat'][wrong]}, wanted {wanted_stat} within {allowed}"


ACTIVATION_ERROR = 2.0**-22


def _more(name: str, value: Tensor) -> Tensor:
    return activate(name, value) + ACTIVATION_ERROR * value


def _less(name: str, value: Tensor) -> Tensor:
    return activate(name, value) - ACTIVATION_ERROR * value


def _none(name: str, value: Tensor) -> Tensor:
    found = activate(name, value)
    return torch.where(found.abs() < ACTIVATION_ERROR * value.abs(), 0.0, found)


def sure_rows(case: Case) -> Tensor:
    """The rows [..] whose choices hang on no rounding.

    Their mask stays where thresholds, x and past_stat move a little, and where an activation is off by what PyTorch and ONNX
    Runtime make of its tail. Both keep gelu's and sigmoid's error small against 1, not against their value (ONNX Runtime's
    sigmoid is 0 below -18), where the op's own kernels keep the relative error of float32.
    """
    mask = case.mask()
    sure = torch.ones(case.load.shape, dtype=torch.bool)
    for moved in case.moved():
        sure &= (moved.mask() == mask).all(-1)
    for off in (_more, _less, _none):
        with patch("clada_export.op.reference.activate", off):
            sure &= (case.mask() == mask).all(-1)
    return sure


def tolerances(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """How far y [.., d] and stat [B, f] may lie from the reference: float32's unit on the terms of all sums, carried on."""
    a, t, x = case.attributes, case.tensors, case.x.double()
    f, _, d = t.w_in.shape
    unit = 8 * 2.0**-24 * max(d, f) ** 0.5
    pre = torch.einsum("...d,fnd->...fn", x.abs(), t.w_in.double().abs())
    biases = [t.gate_bias, t.up_bias] if a.gated else [t.up_bias]
    size = [pre[..., i] + (bias.double().abs() if bias is not None else 0.0) for i, bias in enumerate(biases)]
    hidden, gate = (value.double().abs() for value in neuron_outputs(case.x, t.w_in, t, a))
    # The steepest that an activation gets; of relu2 it grows.
    slope = 2.0 * size[0] if a.activation == "relu2" else 1.2
    moved = unit * slope * size[0]
    if a.gated:
        moved = moved * size[1] + unit * gate * size[1]
    moved = moved + unit * hidden
    weight: Tensor | float = 1.0
    if a.combine == "weighted":
        assert case.score is not None
        score = case.score.double().abs()
        score = score.unsqueeze(1) if score.dim() < x.dim() else score
        weight = score.repeat_interleave(a.granule, -1)
    # What a skipped neuron has counts for nothing, also where it is infinite.
    mask, none = case.mask(), torch.zeros((), dtype=torch.float64)
    size_out = t.w_out.double().abs()
    y = torch.where(mask, (moved + unit * hidden) * weight, none) @ size_out
    if t.down_bias is not None:
        y = y + unit * t.down_bias.double().abs()
    y = y + 1e-30
    if case.x.dtype != torch.float32:
        y = y * 1.1 + 1.1 * torch.finfo(case.x.dtype).eps * (torch.where(mask, hidden * weight, none) @ size_out) + 2.0**-24
        if t.down_bias is not None:
            y = y + torch.finfo(case.x.dtype).eps * t.down_bias.double().abs()
    if not a.emit_stat:
        return y.numpy(), np.zeros(0)
    energy, change = hidden.square(), 2 * hidden * moved + moved.square()
    if a.stat_norm == "row":
        total = energy.sum(-1, keepdim=True).clamp(min=1e-60)
        share = (change + energy * change.sum(-1, keepdim=True) / total) / total + unit
        # Below, h^2 has no bits left in float32: what is of the row is left open.
        share = torch.where(total < 1e-30, torch.full_like(share, 2.0), share)
    else:
        share = change + unit * energy + 1e-37
    counted = (case.load == INF).unsqueeze(-1)
    return y.numpy(), torch.where(counted, share, torch.zeros(())).sum(1).numpy()


# Well-formed calls

SPECIAL = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e-20, 1.0, -1.0, 30.0])
SCORE_VALUES = torch.tensor([0.0, -0.0, NAN, INF, -INF, 0.5, 1.0, -1.0, 1e-45])
LOAD_VALUES = torch.tensor([INF, 0.0, -INF, NAN, 0.7, -0.9, 3e38, -3e38, 1e-45])
STAT_VALUES = torch.tensor([0.0, 1.0, 0.25, NAN, INF, -1.0, 1e-45, 1e38])
FLOATS = tuple(float(np.float32(v)) for v in (0.0, 0.3, -0.3, 1.0, 1e-45, 1e-38, 3.4e38, -3.4e38))
SHAPES = ((1, 1), (1, 4), (2, 3), (1, 7), (2, 9), (1, 20), (3, 0), (0, 2), (), (2,), (2, 2, 2))


@st.composite
def calls(draw: st.DrawFn) -> Case:
    """A call that the contract allows, of small sizes and any values."""
    score = draw(st.sampled_from(SCORES))
    granule = draw(st.sampled_from((1, 1, 2, 5, 65)))
    f = granule * draw(st.integers(1, max(1, 130 // granule)))
    d = draw(st.sampled_from((32, 64))) if score == "shadow" else draw(st.integers(1, 70))
    shape = draw(st.sampled_from(SHAPES))
    stat = len(shape) == 2 and draw(st.booleans())
    use_stat = score == "prefix" or stat
    if use_stat and len(shape) != 2:
        shape = (1, 4)
    low = draw(st.sampled_from([v for v in FLOATS if v > 0]))
    attributes = SparseFFNAttributes(
        activation=draw(st.sampled_from(ACTIVATIONS)),
        gated=draw(st.booleans()),
        score=score,
        rule=draw(st.sampled_from(RULES)),
        granule=granule,
        combine=draw(st.sampled_from(COMBINES)) if score == "external" else "sum",
        load_slope=draw(st.sampled_from(FLOATS)),
        load_min=low,
        load_max=draw(st.sampled_from([v for v in FLOATS if v >= low])),
        use_stat=use_stat,
        backbone_min=draw(st.sampled_from((0.0, 0.5, 1e-38, 2.0))) if use_stat else 0.0,
        prior_gamma=draw(st.sampled_from((0.0, 0.5, 1.0, 30.0))) if use_stat else 0.0,
        emit_stat=len(shape) == 2 and draw(st.booleans()),
        stat_norm=draw(st.sampled_from(STAT_NORMS)),
        emit_active=draw(st.booleans()),
        has_bias=draw(st.booleans()),
    )
    attributes = replace(attributes, **{n: float(np.float32(getattr(attributes, n))) for n in ("backbone_min", "prior_gamma")})
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from((1.0, 1.0, 1e-3, 30.0)))
    strange = draw(st.sampled_from((0.0, 0.0, 0.05, 0.5)))
    infinite = draw(st.sampled_from((0.0, 0.0, 0.0, 0.2)))
    n = 2 if attributes.gated else 1
    dtype = draw(st.sampled_from((torch.float32, torch.float32, torch.float16, torch.bfloat16)))

    def mixed(size: tuple[int, ...], usual: Callable[..., Tensor], values: Tensor, share: float) -> Tensor:
        picked = values[torch.randint(len(values), size, generator=generator)]
        return torch.where(torch.rand(size, generator=generator) < share, picked, usual(size, generator=generator))

    def normal(*size: int) -> Tensor:
        return mixed(size, torch.randn, SPECIAL, strange)

    w_in, w_out = normal(f, n, d).to(dtype), normal(f, d).to(dtype)
    shadow, shadow_scale = quantize_shadow(w_in) if score == "shadow" else (None, None)
    granules = f // granule
    per_granule = attributes.rule != "topk" and draw(st.booleans())
    base = draw(st.sampled_from((0.0, 0.3, 1.0, 3.0, 1e-45, 3.4e38, INF)))
    levels = granules if per_granule else 1
    threshold = torch.full((levels,), base) * (0.5 + torch.rand(levels, generator=generator))
    biases = (normal(f) if attributes.gated else None, normal(f), normal(d)) if attributes.has_bias else ()
    needs_scale = score in ("exact", "shadow")
    scales = normal(f).abs() if needs_scale else None
    tensors = SparseFFNTensors(w_in, w_out, threshold.nan_to_num(nan=0.0, posinf=INF), scales, shadow, shadow_scale, *biases)
    x = normal(*shape, d) * scale
    if infinite and x.numel():
        x = torch.where(torch.rand(*shape, 1, generator=generator) < infinite, torch.full((), INF if scale > 1 else NAN), x)
    per_sequence = score == "external" and len(shape) == 2 and draw(st.booleans())
    score_shape = (*(shape[:1] if per_sequence else shape), granules)
    return Case(
        attributes,
        tensors,
        x.to(draw(st.sampled_from((torch.float32, dtype)))),
        mixed(shape, torch.randn, LOAD_VALUES, draw(st.sampled_from((0.3, 1.0)))),
        mixed(score_shape, torch.rand, SCORE_VALUES, strange) if score == "external" else None,
        mixed((shape[0], f), torch.rand, STAT_VALUES, strange) if use_stat else None,
    )


ISAS = available_isas()


def check_call(drawn: tuple[Case, int]) -> None:
    case, number = drawn
    node = of(case)
    node.isa, node.threads = ISAS[number % len(ISAS)], 1 + (number % 16 == 0)
    found = dict(zip(node.output_names, node.run(), strict=True))
    assert_agrees(case, found)
    # The function body is made for models, where x is [B, S, d]; it has no empty batch.
    if number % 8 == 0 and case.x.dim() == 3 and case.x.numel():
        assert_agrees(case, run_function(case))


@pytest.fixture(autouse=True)
def _quiet() -> None:
    ort.set_default_logger_severity(4)


def test_fuzz_calls() -> None:
    assert fuzz("op calls", st.tuples(calls(), st.integers(0, 2**16)), check_call) > 0


# Wrong nodes


@functools.cache
def seeds() -> tuple[Case, ...]:
    """Calls that mutations start from, one a score."""
    cases = []
    for i, score in enumerate(SCORES):
        even = i % 2 == 0
        attributes = SparseFFNAttributes(
            score=score, rule=RULES[i % 3], gated=even, use_stat=True, emit_stat=even, emit_active=True, has_bias=i > 1
        )
        cases.append(make_case(attributes, shape=(2, 3), d=32, f=12, clear=False, dtype=(torch.float32, torch.float16)[i % 2]))
    return tuple(cases)


_ATTRIBUTE_VALUES = st.sampled_from(
    [
        0,
        1,
        2,
        -1,
        12,
        2**31,
        2**63 - 1,
        -(2**63),
        0.0,
        0.5,
        -0.5,
        *FLOATS,
        NAN,
        INF,
        -INF,
        "",
        "gate",
        "prefix",
        "external",
        "exact",
        "shadow",
        "topk",
        "relative",
        "weighted",
        "none",
        "plain",
        "silu\0",
        [1, 2],
        [0.5],
        ["gate"],
        b"\xff\xfe",
    ]
)
_NAMES = st.sampled_from([each.name for each in fields(SparseFFNAttributes)] + ["plugin_version", "other"])
_KINDS = st.sampled_from(
    [*["attribute"] * 3, "no attribute", "drop", "twice", "swap", "empty", *["shape"] * 2, "type", "number"]
)
_KINDS_TOO = st.sampled_from(["constant", "no output", "more outputs", "empty output"])
_BIG = st.integers(0, 2**16)


@st.composite
def nodes(draw: st.DrawFn) -> Node:
    """A node that was right, with a few things changed."""
    node = of(draw(st.sampled_from(seeds())))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(_BIG) % max(1, len(node.input_names))
        name = node.input_names[at] if node.input_names else ""
        match draw(st.one_of(_KINDS, _KINDS, _KINDS_TOO)):
            case "attribute":
                node.attributes[draw(_NAMES)] = draw(_ATTRIBUTE_VALUES)
            case "no attribute":
                node.attributes.pop(draw(_NAMES), None)
            case "drop" if name:
                node.input_names.pop(at)
            case "twice" if name:
                node.input_names.insert(at, name)
            case "swap":
                other = draw(_BIG) % max(1, len(node.input_names))
                if node.input_names:
                    node.input_names[at], node.input_names[other] = node.input_names[other], node.input_names[at]
            case "empty" if name:
                node.input_names[at] = ""
            case "shape" if name:
                node.inputs[name] = draw(_reshaped(node.inputs[name]))
            case "type" if name:
                if draw(st.booleans()):
                    node.inputs[name] = node.inputs[name].to(draw(st.sampled_from(list(ONNX_TYPES))))
                else:
                    node.types[name] = draw(st.sampled_from(OTHER_TYPES))
            case "number" if name and node.inputs[name].numel():
                flat = node.inputs[name].clone().reshape(-1)
                if flat.is_floating_point():
                    flat[draw(_BIG) % len(flat)] = draw(st.sampled_from((NAN, INF, -INF, -1.0, 0.0)))
                node.inputs[name] = flat.reshape(node.inputs[name].shape)
            case "constant":
                node.constants ^= {name}
            case "no output" if len(node.output_names) > 1:
                node.output_names.pop()
            case "more outputs":
                node.output_names.append(f"more{len(node.output_names)}")
            case "empty output":
                node.output_names[draw(_BIG) % len(node.output_names)] = ""
            case _:
                pass
    return node


@st.composite
def _reshaped(draw: st.DrawFn, value: Tensor) -> Tensor:
    sizes = list(value.shape)
    match draw(st.sampled_from(["more", "less", "none", "flat", "axis", "no axis"])):
        case "more" if sizes:
            sizes[draw(_BIG) % len(sizes)] += 1
        case "less" if sizes:
            sizes[draw(_BIG) % len(sizes)] -= 1
        case "none" if sizes:
            sizes[draw(_BIG) % len(sizes)] = 0
        case "flat":
            sizes = [value.numel()]
        case "axis":
            sizes.insert(draw(_BIG) % (len(sizes) + 1), 1)
        case "no axis" if sizes:
            sizes.pop(draw(_BIG) % len(sizes))
    sizes = [max(0, size) for size in sizes]
    count = int(np.prod(sizes))
    flat = value.reshape(-1)
    if not flat.numel():
        return torch.zeros(sizes, dtype=value.dtype)
    return flat.repeat(-(-max(count, 1) // len(flat)))[:count].reshape(sizes).clone()


def check_node(node: Node) -> None:
    case = node.case()
    if case is not None:
        outputs = dict(zip(output_names(case.attributes), node.run(), strict=True))
        # The reference multiplies w_out's rows of skipped neurons by 0, which is no 0 where they are not finite.
        if case.tensors.w_out.isfinite().all():
            assert_agrees(case, outputs)
        return
    with pytest.raises(Exception) as error:
        found = node.run()
        del found
    assert not isinstance(error.value, AssertionError), error.value
    assert NODE in str(error.value), f"the node is not named: {error.value}"


def test_fuzz_nodes() -> None:
    assert fuzz("op nodes", nodes(), check_node) > 0
