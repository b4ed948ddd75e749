"""One case of the op, and the ways to run it: eager reference, ONNX function body, native library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from clada_export.native.library import ort_library_path
from clada_export.op.reference import SparseFFNTensors, quantize_shadow, sparse_ffn
from graph_passes.op import DOMAIN, OP_TYPE, SparseFFNAttributes, input_names, output_names

ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
}
ISAS = ("avx512", "avx2", "baseline")

# Sums of d and f float32 terms of order one in another order: about sqrt(d + f) 2^-24, 1e-6 at the sizes used here; times 20.
RELATIVE, ABSOLUTE = 2e-5, 2e-5


@dataclass(frozen=True)
class Case:
    attributes: SparseFFNAttributes
    tensors: SparseFFNTensors
    x: Tensor
    load: Tensor
    score: Tensor | None = None
    past_stat: Tensor | None = None

    def input(self, name: str) -> Tensor:
        value = getattr(self, name) if name in ("x", "load", "score", "past_stat") else getattr(self.tensors, name)
        assert isinstance(value, Tensor)
        return value

    def eager(self) -> dict[str, np.ndarray]:
        """What the reference returns."""
        result = sparse_ffn(self.x, self.load, self.tensors, self.attributes, score=self.score, past_stat=self.past_stat)
        found = {"y": result.y, "stat": result.stat, "active": result.active}
        return {name: to_numpy(found[name]) for name in output_names(self.attributes)}

    def reference(self) -> dict[str, np.ndarray]:
        """The same with y in float32, before it is rounded to x's type."""
        return replace(self, x=self.x.float()).eager()

    def mask(self) -> Tensor:
        return sparse_ffn(self.x, self.load, self.tensors, self.attributes, score=self.score, past_stat=self.past_stat).mask

    def moved(self) -> Iterator[Case]:
        """This case with small changes of its inputs, as rounding might make them."""
        generator = torch.Generator().manual_seed(0)
        for step in (1e-4, -1e-4):
            yield replace(self, tensors=replace(self.tensors, threshold=self.tensors.threshold * (1 + step)))
        for _ in range(3):
            noise = 1 + 1e-5 * torch.randn(self.x.shape, generator=generator)
            stat = None if self.past_stat is None else self.past_stat * (1 + 1e-5 * torch.randn(1, generator=generator))
            if stat is not None:
                stat = stat * (1 + 1e-5 * torch.randn(stat.shape, generator=generator))
            yield replace(self, x=self.x.float() * noise, past_stat=stat)

    def is_clear(self) -> bool:
        """No choice hangs on rounding: small changes of the inputs leave the mask as it is."""
        mask = self.mask()
        return all(torch.equal(mask, case.mask()) for case in self.moved())


def make_case(
    attributes: SparseFFNAttributes,
    *,
    shape: tuple[int, ...] = (2, 5),
    d: int = 64,
    f: int = 96,
    dtype: torch.dtype = torch.float32,
    x_dtype: torch.dtype = torch.float32,
    load: Tensor | None = None,
    threshold: Tensor | None = None,
    seed: int = 0,
    per_sequence: bool = False,
    zero_row: tuple[int, ...] | None = None,
    score: Tensor | None = None,
    past_stat: Tensor | None = None,
    clear: bool = True,
) -> Case:
    """A random case, drawn again until its choices are clear.

    Args:
        dtype: of the weights; x_dtype: of x and y, float32 or as the weights.
        zero_row: the index of a row of x that is 0.
        score, past_stat: instead of random ones.
        clear: False takes the first, for comparisons where choices must fall alike whatever they hang on.
    """
    a, n, g = attributes, 2 if attributes.gated else 1, attributes.granule
    for attempt in range(200):
        generator = torch.Generator().manual_seed(1000 * seed + attempt)

        def normal(*size: int, scale: float = 1.0, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*size, generator=generator) * scale

        w_in, w_out = normal(f, n, d, scale=d**-0.5).to(dtype), normal(f, d, scale=f**-0.5).to(dtype)
        shadow, scale = quantize_shadow(w_in) if a.score == "shadow" else (None, None)
        if threshold is None:
            start = {"threshold": 0.25 * g, "relative": 0.3, "topk": max(1.0, 0.4 * f / g)}[a.rule]
            if a.score == "external" and a.rule == "threshold":
                start = 0.4
            chosen = torch.tensor([start])
        else:
            chosen = threshold
        biases = (normal(f, scale=0.1) if a.gated else None, normal(f, scale=0.1), normal(d, scale=0.1)) if a.has_bias else ()
        scale_needed = a.score in ("exact", "shadow")
        tensors = SparseFFNTensors(
            w_in, w_out, chosen, w_out.float().norm(dim=1) if scale_needed else None, shadow, scale, *biases
        )
        loads = load
        if loads is None:
            special = torch.tensor([0.0, float("inf"), 0.7, float("-inf"), float("nan"), -0.9, float("inf"), 2.0])
            rows = int(np.prod(shape)) if shape else 1
            loads = special[torch.arange(rows) % len(special)].reshape(shape)
        score_shape = (shape[0], f // g) if per_sequence else (*shape, f // g)
        x = normal(*shape, d).to(x_dtype)
        if zero_row is not None:
            x[zero_row] = 0.0
        scores, stat = score, past_stat
        if scores is None and a.score == "external":
            scores = torch.rand(*score_shape, generator=generator)
        if stat is None and a.use_stat:
            stat = torch.rand(shape[0], f, generator=generator).square()
        case = Case(a, tensors, x, loads, scores, stat)
        if not clear or case.is_clear():
            return case
    raise AssertionError("no case with clear choices was found")


def to_numpy(value: Tensor) -> np.ndarray:
    """The array; NumPy has bfloat16 from `ml_dtypes`."""
    return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if value.dtype == torch.bfloat16 else value.numpy()


def tensor_proto(name: str, value: Tensor) -> onnx.TensorProto:
    raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return helper.make_tensor(name, ONNX_TYPES[value.dtype], list(value.shape), raw, raw=True)


def make_model(
    case: Case, *, function: bool = False, runtime_inputs: tuple[str, ...] = (), node_attributes: dict[str, Any] | None = None
) -> onnx.ModelProto:
    """A model of one node; the weights are initializers, except those that `runtime_inputs` names."""
    names, outputs = input_names(case.attributes), output_names(case.attributes)
    inputs, initializers = [], []
    for name in names:
        value = case.input(name)
        if name in ("x", "load", "score", "past_stat", *runtime_inputs):
            axes = [f"{name}_{i}" for i in range(value.dim())]
            inputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[value.dtype], axes))
        else:
            initializers.append(tensor_proto(name, value))
    attributes = case.attributes.to_onnx() | (node_attributes or {})
    if function:
        attributes |= {"plugin_namespace": DOMAIN, "plugin_version": "1"}
    node = helper.make_node(OP_TYPE, list(names), list(outputs), domain=DOMAIN, name="layer7/ffn", **attributes)
    types = {"y": ONNX_TYPES[case.x.dtype], "stat": TensorProto.FLOAT, "active": TensorProto.INT32}
    infos = [helper.make_tensor_value_info(name, types[name], None) for name in outputs]
    model = helper.make_model(
        helper.make_graph([node], "one", inputs, infos, initializers),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    if function:
        from graph_passes.function_body import make_function

        weight_type, x_type = (ir.DataType(ONNX_TYPES[tensor.dtype]) for tensor in (case.tensors.w_in, case.x))
        model.functions.append(ir.to_proto(make_function(case.attributes, weight_type=weight_type, x_type=x_type)))
    return model


def feeds(case: Case, names: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    wanted = [n for n in input_names(case.attributes) if n in ("x", "load", "score", "past_stat", *names)]
    return {name: to_numpy(case.input(name)) for name in wanted}


def session(model: onnx.ModelProto, *, library: Path | None = None, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("CLADA_ISA", name)
    try:
        yield
    finally:
        patch.undo()


def run_native(case: Case, *, isa: str = "", threads: int = 1) -> dict[str, np.ndarray]:
    with instruction_set(isa):
        found = session(make_model(case), library=ort_library_path(), threads=threads)
    return run(found, case)


def run_function(case: Case) -> dict[str, np.ndarray]:
    return run(session(make_model(case, function=True)), case)


def run(found: ort.InferenceSession, case: Case, runtime_inputs: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """All outputs by name."""
    arrays = feeds(case, runtime_inputs)
    names = output_names(case.attributes)
    if case.x.dtype != torch.bfloat16:
        return dict(zip(names, found.run(None, arrays), strict=True))
    # bfloat16 passes ONNX Runtime's Python interface only as bits, and comes back by DLPack.
    values = {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)
        if array.dtype == ml_dtypes.bfloat16
        else ort.OrtValue.ortvalue_from_numpy(array)
        for name, array in arrays.items()
    }
    results = found.run_with_ort_values(list(names), values)
    return {name: to_numpy(torch.from_dlpack(each._ortvalue.to_dlpack())) for name, each in zip(names, results, strict=True)}


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this machine has, best first."""
    info = ctypes.CDLL(str(ort_library_path())).clada_build_info
    info.restype = ctypes.c_char_p
    best = info().decode().rsplit(" ", 1)[1]
    return ISAS[ISAS.index(best) :]


SHELLS: dict[str, Callable[[Case], dict[str, np.ndarray]]] = {
    "reference": Case.eager,
    "function_body": run_function,
    **{f"ort_{isa}": lambda case, isa=isa: run_native(case, isa=isa, threads=2) for isa in available_isas()},
}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], x_dtype: torch.dtype = torch.float32) -> None:
    """Compare with `Case.reference()`; `x_dtype`: the type that y must have."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        dtype = to_numpy(torch.empty(0, dtype=x_dtype)).dtype if name == "y" else value.dtype
        assert found[name].dtype == dtype and found[name].shape == value.shape, name
        if name == "active":
            np.testing.assert_array_equal(found[name], value, err_msg=name)
            continue
        # y is rounded to 16 bits once: half an ulp, which is at most eps / 2 of the value. (Below the smallest normal number an
        # ulp of float16 is 2^-24, which ABSOLUTE covers.)
        rounding = torch.finfo(x_dtype).eps / 2 if name == "y" and x_dtype != torch.float32 else 0.0
        array = found[name].astype(np.float32)
        np.testing.assert_allclose(array, value, rtol=RELATIVE + rounding, atol=ABSOLUTE, err_msg=name)
