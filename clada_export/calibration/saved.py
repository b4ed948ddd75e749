"""What autograd saves for a backward pass, in a file: so that the memory of one does not grow with a model's depth."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class SavedInFile:
    """A context in which tensors that autograd saves are kept in memory up to a limit, and beyond it in a file.

    They come back as they were. The file has no name, so that nothing is left of it whatever happens.

    Args:
        module: whose parameters stay where they are.
        limit: bytes.
    """

    def __init__(self, module: nn.Module, limit: int) -> None:
        self._weights = {item.untyped_storage().data_ptr() for item in module.parameters()}
        self._limit = limit
        self._kept = self._end = 0
        self._file: Any = None
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> SavedInFile:
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.__exit__(kind, error, trace)
        if self._file is not None:
            self._file.close()

    def _pack(self, value: Tensor) -> Tensor | _Place:
        if value.untyped_storage().data_ptr() in self._weights:
            return value
        self._kept += value.nbytes
        if self._kept <= self._limit or value.device.type != "cpu" or not value.numel():
            return value
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the context ends
        place = _Place(self._end, tuple(value.shape), value.dtype)
        data = _bytes(value.detach().contiguous())
        while data:
            written = os.pwrite(self._file.fileno(), data, self._end)
            self._end, data = self._end + written, data[written:]
        return place

    def _unpack(self, found: Tensor | _Place) -> Tensor:
        if isinstance(found, Tensor):
            return found
        value = torch.empty(found.shape, dtype=found.dtype)
        data = _bytes(value)
        offset = found.offset
        while data:
            count = os.preadv(self._file.fileno(), [data], offset)
            if not count:
                raise OSError("a temporary file ended early")
            offset, data = offset + count, data[count:]
        return value


def _bytes(value: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    found: Any = value.reshape(-1).view(torch.uint8).numpy()
    return memoryview(found)
