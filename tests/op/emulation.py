"""The CUDA libraries built for the CPU: the same kernels and shells, on an emulated CUDA runtime."""

from __future__ import annotations

import fcntl
import functools
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "emulation"
HEADER = Path("include") / "cuda_runtime_api.h"


def missing_tools() -> str | None:
    """Why the emulation can't be built here, or None."""
    if shutil.which("cmake") is None:
        return "cmake is not installed"
    nvcc = shutil.which("nvcc")
    toolkits = [Path("/usr/local/cuda"), *([Path(nvcc).resolve().parents[1]] if nvcc else [])]
    if not any((toolkit / HEADER).is_file() for toolkit in toolkits) and nvcc is None:
        return "the headers of the CUDA toolkit are not installed"
    return None


@functools.cache
def emulation_folder() -> Path:
    """The build folder, up to date. Skips the test where it can't be built."""
    if (reason := missing_tools()) is not None:
        pytest.skip(reason)
    FOLDER.mkdir(parents=True, exist_ok=True)
    options = [
        "-DCLADA_CUDA_EMULATION=ON",
        "-DCLADA_TESTS=ON",
        "-DCLADA_BENCHMARKS=ON",
        "-DCLADA_WERROR=ON",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    targets = ["plugin_conformance", "clada_trt", "clada_ort_cuda", "clada_cuda_kernels"]
    with (FOLDER.parent / "emulation.lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(FOLDER), *generator, *options],
            ["cmake", "--build", str(FOLDER), "--parallel", "2", "--target", *targets],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return FOLDER
