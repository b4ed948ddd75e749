"""The header of a GGUF file, read with bounds checks, so that a file cut short is named as one before anything is loaded.

The readers of `gguf` and `transformers` map the file and trust its counts: on a partial download they fail deep inside NumPy.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from clada_export.errors import BackendError, UsageError

MAGIC = b"GGUF"
VERSIONS = (2, 3)

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 8
_MAX_STRING = 1 << 24


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` in torch's order, `type_name` as ggml spells it, `bytes` as stored, `end` from the file's start."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    bytes: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself. `metadata` holds scalars and strings; arrays are skipped."""

    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def layers(self) -> int | None:
        """How many layers the metadata says that there are, or None."""
        found = self.metadata.get(f"{self.metadata.get('general.architecture')}.block_count")
        return found if isinstance(found, int) else None

    @property
    def main_type(self) -> str:
        """The type that most weights are stored in, such as `Q4_1`."""
        elements: Counter[str] = Counter()
        for tensor in self.tensors:
            elements[tensor.type_name] += math.prod(tensor.shape)
        return elements.most_common(1)[0][0]


class _CutShortError(Exception):
    """The header runs past the end of the file."""


class _Reader:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream = stream
        self.size = size

    def take(self, count: int) -> bytes:
        if count > self.size - self.stream.tell():
            raise _CutShortError
        return self.stream.read(count)

    def skip(self, count: int) -> None:
        if count > self.size - self.stream.tell():
            raise _CutShortError
        self.stream.seek(count, 1)

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        length = self.number("<Q")
        if length > _MAX_STRING:
            raise _CutShortError
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A scalar or a string; None for an array, which is walked over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"metadata of unknown type {kind}")
        element, count = self.number("<I"), self.number("<Q")
        if element in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[element]))
        elif element == _STRING:
            for _ in range(count):
                self.skip(self.number("<Q"))
        else:
            raise ValueError(f"a metadata array of unknown type {element}")
        return None


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the metadata and the tensor table of a GGUF file, and check that all tensor data is there.

    Args:
        path: the file.

    Raises:
        UsageError: not a GGUF file, a version or tensor type that can't be read, a damaged header, or a file that is shorter
            than its tensor table says (the message holds both sizes in bytes).
        BackendError: the package `gguf` is missing.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            return _read(stream, size, path)
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror or error}") from error
    except _CutShortError:
        raise UsageError(
            f"{path}: the file is cut short or damaged: its header runs past its end, at {size} bytes; download it again"
        ) from None
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{path}: not a readable GGUF file: {error}") from error


def _read(stream: BinaryIO, size: int, path: Path) -> GgufHeader:
    reader = _Reader(stream, size)
    magic = stream.read(4)
    if magic != MAGIC:
        raise UsageError(f"{path}: not a GGUF file: it starts with {magic!r}, and a GGUF file starts with {MAGIC!r}")
    version, tensor_count, metadata_count = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
    if version not in VERSIONS:
        raise UsageError(f"{path}: GGUF version {version} can't be read; versions 2 and 3 can (little-endian)")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = reader.string()
        value = reader.value(reader.number("<I"))
        if value is not None:
            metadata[key] = value
    entries = [_tensor_entry(reader) for _ in range(tensor_count)]
    if not entries:
        raise UsageError(f"{path}: holds no tensors; it may be a vocabulary-only GGUF file")
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-stream.tell() // alignment) * alignment
    names = Counter(entry[0] for entry in entries)
    if len(names) < len(entries):
        raise ValueError(f"two tensors are called {names.most_common(1)[0][0]!r}")
    tensors = tuple(_tensor(name, shape, kind, start + offset) for name, shape, kind, offset in entries)
    last = max(tensors, key=lambda tensor: tensor.end)
    if last.end > size:
        raise UsageError(
            f"{path}: the file is cut short: it has {size} bytes, and its tensor table needs {last.end} "
            f"(up to the end of {last.name!r}); download it again"
        )
    stored = sum(tensor.bytes for tensor in tensors)
    if stored > size:  # then some share their bytes, and would be many times as large once they are loaded
        raise UsageError(f"{path}: damaged: its tensors have {stored} bytes together, and the file has {size}")
    return GgufHeader(metadata, tensors)


def _tensor_entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name, count = reader.string(), reader.number("<I")
    if count > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {count} dimensions")
    dims = tuple(reader.number("<Q") for _ in range(count))
    return name, tuple(reversed(dims)), reader.number("<I"), reader.number("<Q")


def _tensor(name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise BackendError("reading a GGUF file needs the package 'gguf'; install it with: pip install gguf") from error
    try:
        type_ = GGMLQuantizationType(kind)
    except ValueError:
        raise ValueError(f"tensor {name!r} has the unknown ggml type {kind}; a newer 'gguf' package may know it") from None
    block, block_bytes = GGML_QUANT_SIZES[type_]
    elements = math.prod(shape)
    if elements % block:
        raise ValueError(f"tensor {name!r} of shape {shape} does not fill whole blocks of {block} ({type_.name})")
    size = elements // block * block_bytes
    return GgufTensor(name, shape, type_.name, size, start + size)


def check_layers(header: GgufHeader, layers: int | None, path: Path) -> None:
    """transformers drops the tensors of layers that the metadata does not count; here that is an error.

    Args:
        layers: what the config made from the metadata says, or None if it does not say.

    Raises:
        UsageError: the file holds tensors of other layers; says how many.
    """
    found = {int(match[1]) for tensor in header.tensors if (match := re.match(r"blk\.(\d{1,9})\.", tensor.name))}
    # No range as long as the number says: it may say a billion.
    if layers is not None and (len(found) != layers or (found and max(found) != layers - 1)):
        raise UsageError(f"{path}: its metadata says {layers} layers, and it holds tensors for {len(found)}")
