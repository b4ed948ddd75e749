"""How fast this machine is, measured in about half a second."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from clada_export.files.capacity import available_memory, disk

SECONDS = 0.3
"""Of each measurement."""
_SIDE = 512
"""Rows of the matrices: a product takes a millisecond or two, so that some are undisturbed on a machine that is busy."""
_BLOCK = 8 << 20
_MOST_WRITTEN = 256 << 20


@dataclass(frozen=True)
class Machine:
    """What a price depends on besides the model.

    Attributes:
        gflops: of float32 matrix products with PyTorch's threads, 10^9 operations a second.
        disk_gb_s: to write to the disk of the output, 10^9 bytes a second; None where nothing could be written.
        threads: of PyTorch.
        memory: bytes that are available; None if the system does not say.
        disk: bytes that are free where the output goes; None if the system does not say.
        temporary: bytes that are free where the weights lie until the export ends; None if the system does not say.
        same_disk: whether that is the disk of the output.
    """

    gflops: float
    disk_gb_s: float | None
    threads: int
    memory: int | None
    disk: int | None
    temporary: int | None
    same_disk: bool

    def to_dict(self) -> dict[str, object]:
        """Plain numbers."""
        return asdict(self)


def measure_machine(output: Path, temporary: Path | None = None) -> Machine:
    """Measure this machine, with nothing of the model.

    Args:
        output: where the export would go; the folder need not be there yet.
        temporary: where the weights would lie (`clada_export.decoder.spool`); by default the system's temporary folder.
    """
    here = output.absolute()
    while not here.is_dir() and here != here.parent:
        here = here.parent
    try:
        there, other = disk(here), disk(temporary or Path(tempfile.gettempdir()))
        free, beside, same = there.free, other.free, there.device == other.device
    except OSError:
        free, beside, same = None, None, False
    return Machine(_gflops(), _disk_speed(here), torch.get_num_threads(), available_memory(), free, beside, same)


def _gflops() -> float:
    """Of products of square matrices, with all threads or with one, whichever was faster.

    Threads wait for each other, so on a busy machine many of them can be far slower than one, for as long as this measures.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _fastest(SECONDS / 2)
    finally:
        torch.set_num_threads(threads)
    return max(alone, _fastest(SECONDS / 2))


def _fastest(seconds: float) -> float:
    """The speed of the fastest product of those that fit a time: a machine is busy for moments."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand((_SIDE, _SIDE), generator=generator) for _ in range(2))
    fastest, end = float("inf"), time.perf_counter() + seconds
    with torch.inference_mode():
        left @ right  # starts the threads
        while True:
            start = time.perf_counter()
            left @ right
            now = time.perf_counter()
            fastest = min(fastest, now - start)
            if now > end:
                return 2.0 * _SIDE**3 / fastest / 1e9


def _disk_speed(folder: Path) -> float | None:
    """Of one file, until it is on the disk. It is never seen: it has no name."""
    block = os.urandom(1 << 16) * (_BLOCK >> 16)
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            start, written = time.perf_counter(), 0
            while written < _MOST_WRITTEN and time.perf_counter() < start + SECONDS / 2:
                written += stream.write(block)
                stream.flush()
                os.fdatasync(stream.fileno())
            return written / (time.perf_counter() - start) / 1e9
    except OSError:
        return None
