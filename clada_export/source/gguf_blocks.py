"""The blocks of a GGUF file, unpacked a piece at a time by all cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clada_export.decoder.spool import Spool
from clada_export.errors import UsageError
from clada_export.patches.gguf_weights import shape_of

_JOB = 1 << 20
"""Numbers that a core reads at once."""
_PIECE = 1 << 17
"""Numbers that it unpacks at once: what becomes of them meanwhile stays in its cache."""
_GROUP = 16
"""Rows that gguf unpacks at once."""


class BlockReader:
    """Unpacks tensors of one GGUF file into a spool.

    The file is read, not mapped: one that is cut meanwhile gives an error, where a mapping would end the process.

    Args:
        path: of the file.
        file: its descriptor.
        pool: unpacks pieces.
        spool: gets the values.
    """

    def __init__(self, path: Path, file: int, pool: ThreadPoolExecutor, spool: Spool) -> None:
        self._path, self._file, self._pool, self._spool = path, file, pool, spool

    def unpack(self, tensor: Any) -> Tensor:
        """The values of a tensor of gguf's reader, float32, in PyTorch's order of axes.

        Raises:
            UsageError: the file has become shorter, or a type that the package `gguf` can't unpack.
        """
        shape = shape_of(tensor)
        made = self._spool.take(shape, torch.float32)
        rows = made.view(-1, shape[-1] if shape else 1).numpy()
        if not rows.size:
            return made
        bytes_a_row = int(tensor.n_bytes) // len(rows)
        many, few = _rows(_JOB, rows.shape[1]), _rows(_PIECE, rows.shape[1])

        def job(first: int) -> None:
            part = rows[first : first + many]
            start = int(tensor.data_offset) + first * bytes_a_row
            data = np.frombuffer(self._read(start, len(part) * bytes_a_row, tensor.name), dtype=np.uint8)
            data = data.reshape(len(part), bytes_a_row)
            for at in range(0, len(part), few):
                part[at : at + few] = unpacked(data[at : at + few], tensor)

        for _ in self._pool.map(job, range(0, len(rows), many)):
            pass
        return made

    def _read(self, start: int, size: int, name: str) -> bytes:
        data = os.pread(self._file, size, start)
        while len(data) < size:
            more = os.pread(self._file, size - len(data), start + len(data))
            if not more:
                raise UsageError(
                    f"{self._path}: the file became shorter while {name!r} was read from it; is it still being written?"
                )
            data += more
        return data


def unpacked(data: Any, tensor: Any) -> Any:
    """Rows of bytes as rows of float32.

    Args:
        data: uint8 [rows, bytes].
        tensor: of gguf's reader, for its type.

    Raises:
        UsageError: a type that the package `gguf` can't unpack.
    """
    from gguf import dequantize

    kind, count = tensor.tensor_type, len(data)
    if count % _GROUP == 0:
        # Many rows at once cost gguf the fewest steps. To the blocks it is all the same: none lies in two rows.
        data = data.reshape(_GROUP, -1)
    try:
        # The reader has plain numbers with their type, blocks as bytes.
        return dequantize(data.view(tensor.data.dtype), kind).reshape(count, -1)
    except NotImplementedError as error:
        raise UsageError(f"tensor {tensor.name!r} is stored as {kind.name}, which the package 'gguf' can't unpack") from error


def _rows(numbers: int, columns: int) -> int:
    """How many rows have about so many numbers; a multiple of `_GROUP` where that many have."""
    rows = max(1, numbers // columns)
    return rows // _GROUP * _GROUP or rows


@contextmanager
def block_reader(path: Path, spool: Spool) -> Iterator[BlockReader]:
    """A reader of a file's blocks.

    Raises:
        UsageError: the file can't be opened.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror}") from error
    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            yield BlockReader(path, file, pool, spool)
    finally:
        os.close(file)
