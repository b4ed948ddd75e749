"""Device memory and a stream, by the CUDA driver's own library: it is there wherever a GPU can be used.

The primary context of the first GPU is taken, which is the one that TensorRT and PyTorch use.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from clada_export.errors import BackendError

OUT_OF_MEMORY = 2


class Device(Protocol):
    """What a session needs of a GPU. Addresses are integers; copies and runs are in the order of one stream."""

    @property
    def stream(self) -> int:
        """The stream's handle."""

    def allocate(self, size: int) -> int:
        """The address of `size` new bytes, not cleared."""

    def free(self, address: int) -> None:
        """Give memory back."""

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to the device. The array must not change before `synchronize`."""

    def download(self, array: npt.NDArray[Any], address: int) -> None:
        """Copy from the device into a contiguous array; it is filled after `synchronize`."""

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""


class CudaDevice:
    """The first GPU.

    Raises:
        BackendError: no driver, no GPU, or a call fails; every method raises it with the driver's name of the error.
    """

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise BackendError("a GPU is needed, and there is no NVIDIA driver: libcuda.so.1 was not found") from error
        self._call("cuInit", 0)
        device, context, stream = ctypes.c_int(0), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(stream), 1)  # does not wait for the default stream
        self._stream = stream

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream.value or 0)

    def allocate(self, size: int) -> int:
        """The address of `size` new bytes, not cleared."""
        address = ctypes.c_uint64(0)
        status = self._cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        if status == OUT_OF_MEMORY:
            free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
            self._cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
            raise BackendError(
                f"the GPU is out of memory: {size / 1e6:.0f} MB are needed, and {free.value / 1e6:.0f} of "
                f"{total.value / 1e6:.0f} MB are free; run a smaller batch, or export with a smaller --max-past, --max-sequence"
            )
        self._check("cuMemAlloc_v2", status)
        return int(address.value)

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to the device."""
        source = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(array.nbytes), self._stream)

    def download(self, array: npt.NDArray[Any], address: int) -> None:
        """Copy from the device into a contiguous array."""
        target = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes), self._stream)

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""
        self._call("cuStreamSynchronize", self._stream)

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._cuda, name)(*arguments))

    def _check(self, name: str, status: int) -> None:
        if status == 0:
            return
        text = ctypes.c_char_p()
        self._cuda.cuGetErrorName(status, ctypes.byref(text))
        raise BackendError(f"the GPU fails in {name}: {(text.value or b'error').decode()} ({status})")


def host_array(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """An empty array for a download; bfloat16 comes as its 16 bits."""
    return np.empty(shape, np.uint16 if dtype == "bfloat16" else dtype)


def to_float32(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """A downloaded array as float32."""
    if dtype != "bfloat16":
        return array.astype(np.float32, copy=False)
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
