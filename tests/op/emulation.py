"""Native builds for tests, which stay in `build/`: above all the CUDA libraries built for the CPU, on an emulated CUDA runtime.

Each is made once a run, by whichever process comes first; in a later run what has not changed is not compiled again.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.kept import locked

ROOT = Path(__file__).parents[2]
HEADER = Path("include") / "cuda_runtime_api.h"
SANITIZED = ("-DCMAKE_BUILD_TYPE=RelWithDebInfo", "-DCLADA_SANITIZE=ON")


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
def emulation_folder(sanitize: bool = False) -> Path:
    """The build folder, up to date. Skips the test where it can't be built.

    Args:
        sanitize: under the address and undefined-behaviour sanitizers; the plugin and its program only.
    """
    if (reason := missing_tools()) is not None:
        pytest.skip(reason)
    options = ["-DCLADA_CUDA_EMULATION=ON", "-DCLADA_TESTS=ON", "-DCLADA_BENCHMARKS=ON"]
    options += SANITIZED if sanitize else ["-DCMAKE_BUILD_TYPE=Release"]
    targets = ["plugin_conformance", "clada_trt", *([] if sanitize else ["clada_ort_cuda", "clada_cuda_kernels"])]
    return native_build("emulation-sanitized" if sanitize else "emulation", options, targets)


def native_build(name: str, options: Sequence[str], targets: Sequence[str]) -> Path:
    """A folder of `build/` in which these targets are up to date, with warnings as errors.

    Args:
        name: of the folder.
        options: CMake's.
        targets: what to build.
    """
    folder = ROOT / "build" / name
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    # Headers that were fetched stay in the user's cache: the one that tests have goes away with them.
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    with locked(folder.with_suffix(".lock")):
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(folder), *generator, "-DCLADA_WERROR=ON", *options],
            ["cmake", "--build", str(folder), "--parallel", "2", "--target", *targets],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, env=environment)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


def plugin_program(folder: Path) -> tuple[Path, Path]:
    """The conformance program and the plugin library of a build folder."""
    return folder / "tests" / "op" / "native" / "plugin_conformance", folder / "plugins" / "libclada_trt.so"
