"""The tensors of an ONNX file: whether what they say of their sizes is what is there, and whether it is where it may be."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir

from clada_export.errors import UnsupportedModelError, UsageError

MOST_AXES = 32
"""What NumPy had for long, and onnxruntime has too."""
_LARGEST = 2**62
"""Bytes: sizes beyond do not fit into 64 bits, and what is 0 in one axis may be any size in another."""
_FIELDS = {
    "float_data": ("FLOAT", "COMPLEX64"),
    "int32_data": (),  # all that have no field of their own
    "int64_data": ("INT64",),
    "double_data": ("DOUBLE", "COMPLEX128"),
    "uint64_data": ("UINT32", "UINT64"),
    "string_data": ("STRING",),
}
_PAIRS = ("COMPLEX64", "COMPLEX128")


class TensorCheck:
    """Looks at the tensors of one model.

    Args:
        path: of the model file; other files are looked for in its folder.

    Attributes:
        elements: how many numbers the tensors that were looked at hold together.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.elements = 0

    def check(self, tensor: onnx.TensorProto) -> None:
        """Hold one tensor against its bytes.

        Raises:
            UsageError: sizes or types that there are none of, bytes that are missing or too many, or not where they may be.
        """
        where = f"{self._path}: tensor {tensor.name!r}"
        try:
            dtype = ir.DataType(tensor.data_type)
        except ValueError as error:
            raise UsageError(f"{where} has the type {tensor.data_type}, and there is none of that number") from error
        dims = list(tensor.dims)
        if dtype == ir.DataType.UNDEFINED:
            raise UsageError(f"{where} has no type")
        if len(dims) > MOST_AXES:
            raise UsageError(f"{where} has {len(dims)} axes; at most {MOST_AXES} are supported")
        if any(size < 0 for size in dims) or math.prod(max(size, 1) for size in dims) * 16 > _LARGEST:
            raise UsageError(f"{where} has the shape {dims}, which no tensor can have")
        count = math.prod(dims)
        self.elements += count
        if tensor.HasField("segment"):
            raise UsageError(f"{where} is a segment of one; only whole tensors are supported")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            if dtype == ir.DataType.STRING:
                raise UsageError(f"{where} holds text, which can't lie in another file")
            self._check_external(tensor, -(-count * dtype.bitwidth // 8))
        else:
            _check_inside(where, tensor, dtype, count)

    def _check_external(self, tensor: onnx.TensorProto, needed: int) -> None:
        """Raise UsageError unless the tensor's bytes lie in a plain file in the model's folder.

        A model is data from somewhere: it must not make us read, and write into an engine, a file of its choice. A hard link is
        a plain file: whoever can make one could copy the file as well.
        """
        folder = self._path.parent
        given: dict[str, str] = {}
        for entry in tensor.external_data:
            if entry.key in given:
                raise UsageError(f"{self._path}: weight {tensor.name!r} has two entries {entry.key!r} for where it lies")
            given[entry.key] = entry.value
        location = given.get("location", "")
        where = f"{self._path}: weight {tensor.name!r} lies in {location!r}"
        pure = PurePosixPath(location)
        outside = ".." in (*pure.parts, *location.split("\\")) or PureWindowsPath(location).drive
        if not location or "\0" in location or pure.is_absolute() or outside:
            raise UsageError(f"{where}, which is not a path inside the model's folder")
        start, length = (self._number(where, name, given.get(name)) for name in ("offset", "length"))
        file = folder
        try:
            for part in pure.parts:
                file = file / part
                if file.is_symlink():
                    raise UsageError(f"{where}, and {file.name!r} is a symbolic link; put the file itself there")
            if not file.is_file():
                raise UsageError(f"{where}, and there is no such file in {folder}")
            size = file.stat().st_size
        except OSError as error:  # a name that is too long
            raise UsageError(f"{where}: {error.strerror or error}") from error
        if length is not None and length != needed:
            raise UsageError(f"{where} with {length} bytes; its shape and type need {needed}")
        start = start or 0
        if start + needed > size:
            raise UsageError(f"{where} at bytes {start} to {start + needed}, and the file has {size}")

    def _number(self, where: str, name: str, text: str | None) -> int | None:
        if text is None:
            return None
        if not (text.isascii() and text.isdecimal() and len(text) < 20):
            raise UsageError(f"{where} with {name} {text[:40]!r}, which is no number of bytes")
        return int(text)


def _check_inside(where: str, tensor: onnx.TensorProto, dtype: ir.DataType, count: int) -> None:
    """Raise UsageError unless the bytes in the message are as many as type and shape say."""
    own = next((field for field, names in _FIELDS.items() if dtype.name in names), "int32_data")
    used = [field for field in _FIELDS if len(getattr(tensor, field))]
    if tensor.HasField("raw_data"):
        if used or dtype == ir.DataType.STRING:
            raise UsageError(f"{where} holds its data twice, or as bytes though it is text")
        found, wanted, what = len(tensor.raw_data), -(-count * dtype.bitwidth // 8), "bytes"
    else:
        if used not in ([], [own]):
            raise UsageError(f"{where} is {dtype.name}, and its data are in {', '.join(used)}")
        found, what = len(getattr(tensor, own)), "numbers"
        per = 2 if dtype.name in _PAIRS else 1
        small = dtype != ir.DataType.STRING and dtype.bitwidth < 8
        wanted = -(-count * dtype.bitwidth // 8) if small else count * per
    if found != wanted:
        raise UsageError(f"{where} holds {found} {what}; its shape {list(tensor.dims)} and type {dtype.name} need {wanted}")


def refuse_sparse(path: Path, name: str) -> UnsupportedModelError:
    """The error for a sparse tensor: what it holds says nothing of how large it gets."""
    return UnsupportedModelError(f"{path}: {name} is a sparse tensor, which is not supported; export it as a dense one")
