"""On what ONNX Runtime runs a graph: the CPU, or an NVIDIA GPU through its CUDA provider."""

from __future__ import annotations

import onnxruntime as ort

from clada_export.errors import BackendError
from clada_export.native.library import ort_cuda_library_path
from clada_export.native.tensorrt import missing_gpu

CPU, CUDA = "cpu", "cuda"
CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
INSTALL = "pip uninstall onnxruntime, then pip install 'clada-export[ort-gpu]'"


def choose_device(wanted: str, *, own_library: bool, for_cpu: str | None = None) -> str:
    """`cpu` or `cuda`.

    Args:
        wanted: `auto` takes `cuda` where all that it needs is there, the op's CUDA library included.
        own_library: this package's library is to be used: not one of the caller's, and not the op's function body.
        for_cpu: why the graph is one for the CPU, and what to do for another; None if it runs anywhere.

    Raises:
        BackendError: `cuda` is wanted and something is missing; says what, and how to install it.
    """
    if wanted == CPU or (wanted != CUDA and not own_library):
        return CPU
    if for_cpu is not None:
        if wanted == CUDA:
            raise BackendError(f"device cuda: {for_cpu}; or run on the CPU: device cpu")
        return CPU
    missing = _missing_for_cuda(own_library)
    if missing is None:
        return CUDA
    if wanted == CUDA:
        raise BackendError(f"device cuda: {missing}; or run on the CPU: device cpu")
    return CPU


def providers(device: str) -> list[str | tuple[str, dict[str, str]]]:
    """The execution providers for a device, as a session takes them: the first that has an operator runs it."""
    if device == CPU:
        return [CPU_PROVIDER]
    # Products in TF32 keep 10 bits of a float32's 23; the engine was verified without.
    return [(CUDA_PROVIDER, {"device_id": "0", "use_tf32": "0"}), CPU_PROVIDER]


def _missing_for_cuda(own_library: bool) -> str | None:
    if CUDA_PROVIDER not in ort.get_available_providers():
        return f"ONNX Runtime {ort.__version__} has no CUDA provider here: {INSTALL}"
    if (reason := missing_gpu()) is not None:
        return f"no NVIDIA GPU can be used: {reason}"
    try:
        if own_library:
            ort_cuda_library_path()
    except BackendError as error:
        return str(error)
    return None
