"""Find the native libraries and check that they fit this package."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from pathlib import Path

from clada_export.errors import BackendError
from graph_passes.op import DOMAIN, OP_TYPE, OP_VERSION

LIBRARY_NAME = "libclada_ort.so"
ENVIRONMENT_VARIABLE = "CLADA_ORT_LIBRARY"
_DISTRIBUTION = "clada-export"


def _candidates() -> list[Path]:
    found = [Path(__file__).parent / "lib" / LIBRARY_NAME]
    # An editable install leaves the sources where they are and puts only the library into site-packages.
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return found
    found.append(Path(str(distribution.locate_file(f"clada_export/lib/{LIBRARY_NAME}"))))
    return found


def ort_library_path() -> Path:
    """The ONNX Runtime custom-op library: `CLADA_ORT_LIBRARY` if that is set, else the installed one.

    Raises:
        BackendError: there is none; says where it was looked for.
    """
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    candidates = [Path(override)] if override else _candidates()
    for path in candidates:
        if path.is_file():
            return path.resolve()
    places = ", ".join(str(path) for path in candidates)
    if override:
        raise BackendError(f"{ENVIRONMENT_VARIABLE} is {override!r}, which is no file; unset it or point it to {LIBRARY_NAME}")
    raise BackendError(
        f"{LIBRARY_NAME} was not found (looked for {places}); "
        f"install the package with its native part: pip install {_DISTRIBUTION}"
    )


def check_library(path: Path) -> None:
    """Check that a library implements this package's version of the op.

    Raises:
        BackendError: it can't be loaded, is no library of ours, or implements another version.
    """
    wanted = f"{DOMAIN}::{OP_TYPE} version {OP_VERSION}"
    if not path.is_file():
        raise BackendError(f"library {path} is no file; wanted a {LIBRARY_NAME} with {wanted}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(
            f"library {path} can't be loaded ({error}); wanted a {LIBRARY_NAME} with {wanted}: rebuild it"
        ) from error
    try:
        version = library.clada_op_version
    except AttributeError as error:
        raise BackendError(f"library {path} has no clada_op_version; wanted a {LIBRARY_NAME} with {wanted}") from error
    version.argtypes = []
    version.restype = ctypes.c_int
    found = int(version())
    if found != OP_VERSION:
        raise BackendError(
            f"library {path} implements {DOMAIN}::{OP_TYPE} version {found}; wanted version {OP_VERSION}: "
            f"install {_DISTRIBUTION} and the library from the same release"
        )


def build_info(path: Path) -> str:
    """What the library says about itself: version, compiler, instruction set.

    Raises:
        BackendError: as `check_library`.
    """
    check_library(path)
    info = ctypes.CDLL(str(path)).clada_build_info
    info.argtypes = []
    info.restype = ctypes.c_char_p
    return str(info().decode())
