"""The framework-free kernel under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DCLADA_SANITIZE=ON", "-DCLADA_ORT=OFF", "-DCLADA_WERROR=ON"]
    for command in (
        [*configure, "-DCMAKE_BUILD_TYPE=RelWithDebInfo"],
        ["cmake", "--build", str(tmp_path), "--parallel", "2"],
        [str(tmp_path / "tests" / "op" / "native" / "clada_kernel_test"), "300"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
