"""Large arrays that wait on disk: the logits of one token are 0.6 MB for a vocabulary of 152 thousand."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import numpy.typing as npt

from clada_export.errors import UsageError
from clada_export.foreign import DISK_FULL

SMALL = 1 << 20
"""Bytes; an array that is no larger stays in memory."""
Number = TypeVar("Number", bound=np.generic)


class SetAside:
    """Keeps arrays in a file that has no name, so that nothing is left of them however the process ends.

    Args:
        folder: where the file is to lie; the system's temporary folder if it can't be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None

    def keep(self, array: npt.NDArray[Number]) -> npt.NDArray[Number]:
        """The same numbers, mapped from the file: the memory that they take can be had back by whoever needs it.

        Raises:
            UsageError: the disk is full.
        """
        if array.nbytes <= SMALL:
            return array
        if self._file is None:
            self._file = _nameless(self._folder)
        start = self._file.tell()
        try:
            self._file.write(np.ascontiguousarray(array).data)
            self._file.flush()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise UsageError(
                f"{self._folder}: no space for the logits that verification compares (another {array.nbytes} bytes); free some"
            ) from error
        return np.memmap(self._file, array.dtype, "r", start, array.shape)


def _nameless(folder: Path) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(dir=folder)
    except OSError:
        return tempfile.TemporaryFile()
