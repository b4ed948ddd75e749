"""The CUDA kernels from Python, on tensors: what `ffn_cuda.py` times. The library is the CMake target `clada_cuda_kernels`.

Built with CLADA_CUDA_EMULATION the same code runs on CPU tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph_passes.contract import ATTRIBUTES, INPUTS, OUTPUTS
from graph_passes.contract_types import Attribute
from graph_passes.op import SparseFFNAttributes

FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _c_type(attribute: Attribute) -> type[Any]:
    return (
        ctypes.c_bool
        if attribute.is_flag
        else {"string": ctypes.c_int, "int": ctypes.c_int64, "float": ctypes.c_float}[attribute.type]
    )


class _Attributes(ctypes.Structure):
    """clada::Attributes."""

    _fields_ = tuple((attribute.name, _c_type(attribute)) for attribute in ATTRIBUTES)

    @classmethod
    def of(cls, attributes: SparseFFNAttributes) -> _Attributes:
        """The same values; names by their place in the list of those allowed."""
        values = attributes.to_onnx()
        places = {a.name: a.allowed.index(values[a.name]) for a in ATTRIBUTES if a.type == "string"}
        return cls(**{**values, **places})


class _Problem(ctypes.Structure):
    """clada::Problem."""

    _fields_ = (
        *((tensor.name, ctypes.c_void_p) for tensor in (*INPUTS, *OUTPUTS)),
        ("attributes", _Attributes),
        ("batch", ctypes.c_int64),
        ("sequence", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("intermediate_size", ctypes.c_int64),
        ("weight_type", ctypes.c_int),
        ("x_type", ctypes.c_int),
        ("threshold_count", ctypes.c_int64),
        ("score_per_sequence", ctypes.c_bool),
    )


@dataclass
class Call:
    """One call, ready to be enqueued again and again. Keeps its tensors alive."""

    problem: _Problem
    tensors: Mapping[str, Tensor]

    @property
    def y(self) -> Tensor:
        return self.tensors["y"]

    @property
    def active(self) -> Tensor:
        return self.tensors["active"]


class CudaKernels:
    """The loaded library.

    Raises:
        OSError: it can't be loaded.
        RuntimeError: its structs differ from those declared here.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.clada_problem_bytes.restype = ctypes.c_size_t
        self._library.clada_workspace_bytes.restype = ctypes.c_size_t
        self._library.clada_gemm_name.restype = ctypes.c_char_p
        wanted, found = ctypes.sizeof(_Problem), int(self._library.clada_problem_bytes())
        if wanted != found:
            raise RuntimeError(f"{path}: clada::Problem has {found} bytes there and {wanted} here; build it from these sources")

    @property
    def gemm(self) -> str:
        """The library that computes prompts."""
        name: bytes = self._library.clada_gemm_name()
        return name.decode()

    def call(self, attributes: SparseFFNAttributes, tensors: Mapping[str, Tensor]) -> Call:
        """Prepare a call.

        Args:
            tensors: the op's inputs by name, contiguous, on one device; x is [B, S, d].
        """
        a, x, w_in = attributes, tensors["x"], tensors["w_in"]
        batch, sequence, d = x.shape
        f = w_in.shape[0]
        problem = _Problem(
            attributes=_Attributes.of(a),
            batch=batch,
            sequence=sequence,
            hidden_size=d,
            intermediate_size=f,
            weight_type=FLOAT_TYPES[w_in.dtype],
            x_type=FLOAT_TYPES[x.dtype],
            threshold_count=tensors["threshold"].numel(),
            score_per_sequence="score" in tensors and tensors["score"].dim() == 2,
        )
        made = dict(tensors)
        made["y"] = torch.full_like(x, float("nan"))
        if a.emit_stat:
            made["stat"] = torch.full((batch, f), float("nan"), device=x.device)
        if a.emit_active:
            made["active"] = torch.full((batch, sequence), -1, dtype=torch.int32, device=x.device)
        for name, value in made.items():
            if not value.is_contiguous():
                raise ValueError(f"{name} is not contiguous")
            setattr(problem, name, value.data_ptr())
        return Call(problem, made)

    def workspace(self, calls: list[Call], device: torch.device) -> Tensor:
        """Scratch memory for any of the calls."""
        sizes = [int(self._library.clada_workspace_bytes(ctypes.byref(call.problem))) for call in calls]
        return torch.empty(max(sizes) + 256, dtype=torch.uint8, device=device)

    def run(self, call: Call, workspace: Tensor, stream: int = 0) -> None:
        """Enqueue.

        Raises:
            RuntimeError: what the kernels say went wrong.
        """
        error = ctypes.create_string_buffer(512)
        aligned = (workspace.data_ptr() + 255) // 256 * 256
        if self._library.clada_run(
            ctypes.byref(call.problem), ctypes.c_void_p(aligned), ctypes.c_void_p(stream), error, ctypes.c_size_t(len(error))
        ):
            raise RuntimeError(error.value.decode())
