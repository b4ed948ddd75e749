"""The three native libraries are found, or the error says what to install."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from clada_export.errors import BackendError
from clada_export.native import library as native

LIBRARIES = {
    "CLADA_ORT_LIBRARY": (native.ort_library_path, "libclada_ort.so", "pip install"),
    "CLADA_ORT_CUDA_LIBRARY": (native.ort_cuda_library_path, "libclada_ort_cuda.so", "CUDA toolkit"),
    "CLADA_TRT_LIBRARY": (native.trt_library_path, "libclada_trt.so", "CUDA toolkit"),
}


@pytest.mark.parametrize("variable", LIBRARIES)
def test_lookup(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[[], Path]
    find, name, remedy = LIBRARIES[variable]
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(native, "_candidates", lambda name: [tmp_path / name])
    with pytest.raises(BackendError, match=rf"{name} was not found \(looked for {tmp_path}.*{remedy}") as error:
        find()
    assert error.value.exit_code == 5
    (tmp_path / name).touch()
    assert find() == tmp_path / name
    monkeypatch.setenv(variable, str(tmp_path / "other.so"))
    with pytest.raises(BackendError, match=rf"{variable} is .*other\.so"):
        find()
    (tmp_path / "other.so").touch()
    assert find() == tmp_path / "other.so"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_another_version_of_the_op(tmp_path: Path) -> None:
    for code, said in (("int clada_op_version(void) { return 7; }", "version 7; wanted version"), ("", "no clada_op_version")):
        library = tmp_path / f"{len(code)}.so"
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=code, text=True, check=True)
        with pytest.raises(BackendError, match=said):
            native.check_library(library)
