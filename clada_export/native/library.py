"""Find the native libraries and check that they fit this package."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from pathlib import Path

from clada_export.errors import BackendError
from clada_export.native.sealed import sealed_copy
from graph_passes.op import DOMAIN, OP_TYPE, OP_VERSION

LIBRARY_NAME = "libclada_ort.so"
ORT_CUDA_LIBRARY_NAME = "libclada_ort_cuda.so"
TRT_LIBRARY_NAME = "libclada_trt.so"
ENVIRONMENT_VARIABLE = "CLADA_ORT_LIBRARY"
ORT_CUDA_ENVIRONMENT_VARIABLE = "CLADA_ORT_CUDA_LIBRARY"
TRT_ENVIRONMENT_VARIABLE = "CLADA_TRT_LIBRARY"
_DISTRIBUTION = "clada-export"
_NATIVE_PART = f"install the package with its native part: pip install {_DISTRIBUTION}"
_CUDA_PART = (
    "it is built only where nvcc is found: install the CUDA toolkit (put nvcc on PATH, or set CUDA_HOME) and install the "
    f"package again: pip install --force-reinstall --no-deps {_DISTRIBUTION}"
)


def ort_library_path() -> Path:
    """The ONNX Runtime custom-op library: `CLADA_ORT_LIBRARY` if that is set, else the installed one.

    Raises:
        BackendError: there is none; says where it was looked for.
    """
    return _find(LIBRARY_NAME, ENVIRONMENT_VARIABLE, _NATIVE_PART)


def require_ort(what: str) -> Path:
    """The custom-op library, checked, where ONNX Runtime is installed too.

    Args:
        what: needs it, for the message.

    Raises:
        BackendError: ONNX Runtime or the library is missing, or the library is not of this package.
    """
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise BackendError(f"{what} needs ONNX Runtime: pip install 'clada-export[ort]'") from error
    library = ort_library_path()
    check_library(library)
    return library


def ort_cuda_library_path() -> Path:
    """The custom-op library for ONNX Runtime's CUDA and CPU providers: `CLADA_ORT_CUDA_LIBRARY`, else the installed one.

    Raises:
        BackendError: there is none; says where it was looked for, and what builds it.
    """
    return _find(ORT_CUDA_LIBRARY_NAME, ORT_CUDA_ENVIRONMENT_VARIABLE, _CUDA_PART)


def trt_library_path() -> Path:
    """The TensorRT plugin library: `CLADA_TRT_LIBRARY` if that is set, else the installed one.

    Raises:
        BackendError: there is none; says where it was looked for, and what builds it.
    """
    return _find(TRT_LIBRARY_NAME, TRT_ENVIRONMENT_VARIABLE, _CUDA_PART)


def _find(name: str, variable: str, remedy: str) -> Path:
    override = os.environ.get(variable)
    candidates = [Path(override)] if override else _candidates(name)
    for path in candidates:
        if path.is_file():
            return path.resolve()
    if override:
        raise BackendError(f"{variable} is {override!r}, which is no file; unset it or point it to {name}")
    places = ", ".join(str(path) for path in candidates)
    raise BackendError(f"{name} was not found (looked for {places}); {remedy}")


def _candidates(name: str) -> list[Path]:
    found = [Path(__file__).parent / "lib" / name]
    # An editable install leaves the sources where they are and puts only the library into site-packages.
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return found
    found.append(Path(str(distribution.locate_file(f"clada_export/lib/{name}"))))
    return found


def check_library(path: Path, shown: Path | None = None) -> None:
    """Check that a library, any of the three, implements this package's version of the op. It is loaded for that.

    Args:
        shown: what messages call it, where it is loaded from a copy.

    Raises:
        BackendError: it can't be loaded, is no library of ours, or implements another version.
    """
    wanted = f"{DOMAIN}::{OP_TYPE} version {OP_VERSION}"
    name = shown or path
    if not path.is_file():
        raise BackendError(f"library {name} is no file; wanted a library with {wanted}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        said = str(error).replace(str(path), str(name))
        raise BackendError(f"library {name} can't be loaded ({said}); wanted a library with {wanted}: rebuild it") from error
    try:
        version = library.clada_op_version
    except AttributeError as error:
        raise BackendError(f"library {name} has no clada_op_version; wanted a library with {wanted}") from error
    version.argtypes = []
    version.restype = ctypes.c_int
    found = int(version())
    if found != OP_VERSION:
        raise BackendError(
            f"library {name} implements {DOMAIN}::{OP_TYPE} version {found}; wanted version {OP_VERSION}: "
            f"install {_DISTRIBUTION} and the library from the same release"
        )


def check_content(content: bytes, name: Path) -> Path:
    """`check_library` of a library's bytes, wherever they came from.

    Args:
        name: of the file that they were read from.

    Returns:
        Where a copy lies that nobody else can change: the place to load it from.

    Raises:
        BackendError: as `check_library`, or there is no room for the copy.
    """
    try:
        path = sealed_copy(content, name.name)
    except OSError as error:
        raise BackendError(f"library {name}: a copy to load can't be made: {error.strerror or error}") from error
    check_library(path, name)
    return path


def build_info(path: Path) -> str:
    """What the library says about itself: version, compiler, what it was built for.

    Raises:
        BackendError: as `check_library`.
    """
    check_library(path)
    info = ctypes.CDLL(str(path)).clada_build_info
    info.argtypes = []
    info.restype = ctypes.c_char_p
    return str(info().decode())
