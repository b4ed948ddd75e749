"""One case of QuantMatMul, and the ways to run it: reference, ONNX function body, each native instruction set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from op_shells import instruction_set, session

from clada_export.native.library import ort_library_path
from clada_export.op.quant_reference import quant_matmul
from graph_passes.quant.contract import DOMAIN, OP_TYPE
from graph_passes.quant.function_body import make_function
from graph_passes.quant.layout import QuantisedMatrix, pack
from graph_passes.quant.op import QuantMatMulAttributes, input_names

ISAS = ("amx", "avx512vnni", "avx512", "avxvnni", "avx2", "baseline")


@dataclass(frozen=True)
class Case:
    attributes: QuantMatMulAttributes
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None = None

    def feeds(self) -> dict[str, np.ndarray]:
        found = {"x": self.x, "weight": self.weight, "bias": self.bias}
        return {name: found[name] for name in input_names(self.attributes)}


def make_case(
    bits: int = 8,
    *,
    shape: tuple[int, ...] = (5,),
    n: int = 40,
    k: int = 96,
    has_offset: bool = False,
    has_bias: bool = False,
    seed: int = 0,
) -> Case:
    """Random codes, signed scales over many powers of two with some zeros, and rows of different sizes."""
    rng = np.random.default_rng(seed)
    blocks = k // 32

    def halves() -> np.ndarray:
        values = rng.standard_normal((n, blocks)) * 2.0 ** rng.integers(-9, 3, (n, blocks))
        values[rng.random((n, blocks)) < 0.1] = 0.0
        return values.astype(np.float16)

    matrix = QuantisedMatrix(
        rng.integers(0, 1 << bits, (n, k), dtype=np.uint8), halves(), bits, halves() if has_offset else None
    )
    x = (rng.standard_normal((*shape, k)) * 2.0 ** rng.integers(-4, 5, (*shape, 1))).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32) if has_bias else None
    return Case(matrix.attributes(has_bias), x, pack(matrix), bias)


def make_model(case: Case, *, function: bool = False, constant: bool = False, **changes: Any) -> onnx.ModelProto:
    """A model of one node; `constant` makes an initializer of the weight, `changes` are attributes (None: without it)."""
    names = input_names(case.attributes)
    types = {"x": TensorProto.FLOAT, "weight": helper.np_dtype_to_tensor_dtype(case.weight.dtype), "bias": TensorProto.FLOAT}
    feeds = case.feeds()
    inputs = [
        helper.make_tensor_value_info(name, types[name], [f"{name}_{i}" for i in range(feeds[name].ndim)])
        for name in names
        if not (constant and name == "weight")
    ]
    initializers = [onnx.numpy_helper.from_array(case.weight, "weight")] if constant else []
    attributes = {key: value for key, value in (case.attributes.to_onnx() | changes).items() if value is not None}
    node = helper.make_node(OP_TYPE, list(names), ["y"], "layer7/q_proj", domain=DOMAIN, **attributes)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], "one", inputs, [y], initializers),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    if function:
        model.functions.append(ir.to_proto(make_function(case.attributes)))
    return model


def open_native(case: Case, isa: str = "", threads: int = 1, **changes: Any) -> ort.InferenceSession:
    with instruction_set(isa):
        return session(make_model(case, **changes), library=ort_library_path(), threads=threads)


def run(found: ort.InferenceSession, case: Case) -> np.ndarray:
    known = {each.name for each in found.get_inputs()}
    y: np.ndarray = found.run(None, {name: value for name, value in case.feeds().items() if name in known})[0]
    return y


def run_reference(case: Case) -> np.ndarray:
    return quant_matmul(case.x, case.weight, case.attributes, case.bias)


def run_function(case: Case) -> np.ndarray:
    return run(session(make_model(case, function=True)), case)


def run_evaluator(case: Case) -> np.ndarray:
    with np.errstate(all="ignore"):
        y: np.ndarray = ReferenceEvaluator(make_model(case, function=True)).run(None, case.feeds())[0]
    return y


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this machine has."""
    found = []
    case = make_case()
    for isa in ISAS:
        try:
            open_native(case, isa)
        except Exception as error:
            assert "one that this machine has" in str(error)
            continue
        found.append(isa)
    return tuple(found)


NATIVE: dict[str, Callable[[Case], np.ndarray]] = {
    f"ort_{isa}": lambda case, isa=isa: run(open_native(case, isa, threads=2), case) for isa in available_isas()
}
BODIES: dict[str, Callable[[Case], np.ndarray]] = {"function_body": run_function, "reference_evaluator": run_evaluator}
EVERY = NATIVE | BODIES


def assert_bits(found: np.ndarray, wanted: np.ndarray) -> None:
    """The same bits; where one is NaN the other is."""
    assert found.dtype == wanted.dtype == np.float32 and found.shape == wanted.shape
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    good = ~np.isnan(wanted)
    np.testing.assert_array_equal(found[good].view(np.int32), wanted[good].view(np.int32))


def assert_close(found: np.ndarray, wanted: np.ndarray, case: Case) -> None:
    """The same up to the rounding of sums of B blocks in another order: each term's size times a few ulps."""
    assert found.dtype == wanted.dtype == np.float32 and found.shape == wanted.shape
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    good = np.isfinite(wanted)
    np.testing.assert_array_equal(found[~good & ~np.isnan(wanted)], wanted[~good & ~np.isnan(wanted)])
    x = case.x.astype(np.float64)
    largest = np.abs(np.where(np.isfinite(x), x, 0)).max(axis=-1, keepdims=True, initial=0)
    allowed = 1e-6 * largest * 2.0**case.attributes.bits * x.shape[-1] + 1e-5 * np.abs(wanted)
    assert (np.abs(found.astype(np.float64)[good] - wanted[good]) <= np.broadcast_to(allowed, wanted.shape)[good]).all()
