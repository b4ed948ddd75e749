"""Run cases of the op through a TensorRT plugin library, by the program of `native/plugin_conformance.cc`."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from op_shells import Case, to_numpy
from torch import Tensor

from graph_passes.op import DOMAIN, OP_TYPE, OP_VERSION, input_names, output_names

NODE = "layer7/ffn"
TYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.int32: "int32",
}
# Leading axes that an engine leaves open; None: all of them, less as many as follow.
OPEN_AXES = {"x": (None, 1), "load": (None, 0), "score": (None, 1), "past_stat": (1, 0)}

FieldValue = str | int | float | Sequence[int] | Sequence[float]


@dataclass(frozen=True)
class PluginCase:
    """What a network would give the plugin: fields and inputs, right or wrong."""

    fields: Mapping[str, FieldValue]
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    creator: tuple[str, str, str] = (OP_TYPE, str(OP_VERSION), DOMAIN)

    @classmethod
    def of(cls, case: Case) -> PluginCase:
        """The same call."""
        inputs = {name: case.input(name) for name in input_names(case.attributes)}
        return cls(case.attributes.to_onnx(), inputs, output_names(case.attributes))

    def with_fields(self, **fields: FieldValue) -> PluginCase:
        """The same with other fields."""
        return replace(self, fields={**self.fields, **fields})


@dataclass(frozen=True)
class PluginResult:
    """What came of a case.

    Attributes:
        failed: the step that failed, or "" if none did; `message` says how.
        log: what the plugin said to TensorRT's logger.
        outputs: by name.
    """

    failed: str
    message: str
    log: tuple[str, ...] = ()
    outputs: dict[str, np.ndarray] = field(default_factory=dict)


def run_plugin_cases(cases: Sequence[Case | PluginCase], binary: Path, library: Path) -> list[PluginResult]:
    """Run all cases in one process.

    Args:
        binary: the built `plugin_conformance`.
        library: the plugin, built for the same CUDA runtime (real or emulated) as the program.
    """
    made = [PluginCase.of(case) if isinstance(case, Case) else case for case in cases]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, case in enumerate(made):
            (folder / f"{i:05}.case").write_bytes(_pack(case))
        # A program to run it under, such as compute-sanitizer with its options.
        prefix = shlex.split(os.environ.get("CLADA_CONFORMANCE_PREFIX", ""))
        done = subprocess.run([*prefix, binary, library, folder], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{binary} ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return [_unpack((folder / f"{i:05}.result").read_bytes(), case.outputs) for i, case in enumerate(made)]


def plugin_fields(binary: Path, library: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Name, version and namespace of the plugin's creator; the types of its fields by name."""
    done = subprocess.run([binary, library, "--fields"], capture_output=True, text=True, check=True)
    creator, *fields = (tuple(line.split()[1:]) for line in done.stdout.splitlines())
    return creator, dict(fields)  # type: ignore[arg-type]


def _field(name: str, value: FieldValue) -> str:
    if isinstance(value, str):
        return f"field {name} string {value}"
    values = [value] if isinstance(value, int | float) else list(value)
    kind = "float" if any(isinstance(each, float) for each in values) else "int"
    return " ".join([f"field {name} {kind}", *(repr(each) for each in values)])


def _open_axes(name: str, rank: int) -> int:
    most, kept = OPEN_AXES.get(name, (0, 0))
    return max(rank - kept, 0) if most is None else min(most, rank)


def _pack(case: PluginCase) -> bytes:
    lines = [f"node {NODE}", f"creator {' '.join(case.creator)}", *(_field(*each) for each in case.fields.items())]
    data = []
    for name, value in case.inputs.items():
        sizes = [_open_axes(name, value.dim()), value.dim(), *value.shape]
        lines.append(" ".join(["input", name, TYPE_NAMES[value.dtype], *map(str, sizes)]))
        data.append(to_numpy(value.contiguous()).tobytes())
    return "\n".join([*lines, "end", ""]).encode() + b"".join(data)


def _unpack(raw: bytes, names: tuple[str, ...]) -> PluginResult:
    text, _, data = raw.partition(b"\nend\n")
    failed = message = ""
    log, outputs, offset = [], {}, 0
    for line in text.decode().splitlines():
        word, _, rest = line.partition(" ")
        if word == "status":
            failed, _, message = rest.partition(" ")
        elif word == "log":
            log.append(rest)
        elif word == "output":
            index, kind, _, *sizes = rest.split()
            dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
            shape = tuple(map(int, sizes))
            count = int(np.prod(shape))
            outputs[names[int(index)]] = np.frombuffer(data, dtype, count, offset).reshape(shape)
            offset += count * dtype.itemsize
    return PluginResult("" if failed == "ok" else failed, message, tuple(log), outputs)


def conformance_program() -> Path | None:
    """The program of `CLADA_PLUGIN_CONFORMANCE`: built for the real CUDA runtime, on a machine with a GPU."""
    found = os.environ.get("CLADA_PLUGIN_CONFORMANCE")
    return Path(found) if found else None
