"""Every file here needs a GPU and is skipped without one. `benchmarks/gpu_suite.py` runs them on a machine that has one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.cuda_kernels import CudaKernels

sys.path.insert(0, str(Path(__file__).parents[1] / "op"))


@pytest.fixture(scope="session")
def kernels() -> CudaKernels:
    """The kernels, built for this GPU (`benchmarks/gpu_suite.py build`)."""
    path = os.environ.get("CLADA_CUDA_KERNELS")
    if not path:
        pytest.skip("CLADA_CUDA_KERNELS does not name libclada_cuda_kernels.so")
    return CudaKernels(Path(path))
