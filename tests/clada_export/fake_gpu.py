"""A GPU made of NumPy and an engine made of ONNX Runtime: what the TensorRT session calls, without TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from clada_export.errors import BackendError
from clada_export.native.tensorrt import Backend, Messages

TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


class FakeDevice:
    """Memory by address; `limit` is its size in bytes."""

    stream = 7

    def __init__(self, limit: int = 1 << 30) -> None:
        self.memory: dict[int, bytearray] = {}
        self.limit = limit
        self.allocations = 0

    def allocate(self, size: int) -> int:
        if sum(map(len, self.memory.values())) + size > self.limit:
            raise BackendError(f"the GPU is out of memory: {size} bytes are needed")
        self.allocations += 1
        address = 1000 * self.allocations
        self.memory[address] = bytearray(b"\xff" * size)
        return address

    def free(self, address: int) -> None:
        del self.memory[address]

    def upload(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous and array.nbytes <= len(self.memory[address])
        self.memory[address][: array.nbytes] = array.tobytes()

    def download(self, array: np.ndarray, address: int) -> None:
        array[...] = np.frombuffer(self.memory[address], array.dtype, array.size).reshape(array.shape)

    def synchronize(self) -> None:
        pass


class FakeContext:
    """An execution context; runs on `FakeEngine.fail` = None only."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        self._engine.contexts.append(self)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch, tokens = self.shapes["input_ids"]
        if len(self._engine.outputs[name].shape) == 1:
            return (batch,)
        width = self._engine.outputs[name].shape[-1]
        return (batch, self._engine.outputs[name].shape[1], tokens) if name == "active_neurons" else (batch, tokens, width)

    def execute_async_v3(self, stream: int) -> bool:
        engine, memory = self._engine, self._engine.device.memory
        if engine.fail is not None:
            engine.messages.errors.append(engine.fail)
            return False
        feeds = {}
        for name, value in engine.inputs.items():
            kind = np.dtype(TYPES[value.type])
            count = int(np.prod(self.shapes[name]))
            feeds[name] = np.frombuffer(memory[self.addresses[name]], kind, count).reshape(self.shapes[name])
        results = engine.session.run(list(engine.outputs), feeds)
        for name, array in zip(engine.outputs, results, strict=True):
            engine.device.upload(self.addresses[name], np.ascontiguousarray(array))
        engine.runs.append((self.profile, *self.shapes["input_ids"]))
        return True


class FakeEngine:
    """An `ICudaEngine` over the ONNX file. `runs` lists (profile, batch, tokens)."""

    def __init__(self, model: Path, device: FakeDevice, messages: Messages) -> None:
        self.session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.device = device
        self.messages = messages
        self.fail: str | None = None
        self.contexts: list[FakeContext] = []
        self.runs: list[tuple[Any, ...]] = []
        self.kernels = FakeKernels()

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def create_execution_context(self, config: Any = None) -> FakeContext:
        return FakeContext(self)

    def create_runtime_config(self) -> Any:
        return self.kernels


class FakeKernels:
    """A runtime configuration and its cache in one."""

    def __init__(self) -> None:
        self.read = b""

    def create_runtime_cache(self) -> FakeKernels:
        return self

    def set_runtime_cache(self, cache: Any) -> bool:
        return cache is self

    def deserialize(self, content: bytes) -> bool:
        self.read = content
        return True

    def serialize(self) -> bytes:
        return b"kernels"


def fake_backend(version: str = "1.7.1.116", trt: Any = None) -> Backend:
    """A backend that nothing was imported for."""
    return Backend("tensorrt_rtx", version, trt, None, Messages())
