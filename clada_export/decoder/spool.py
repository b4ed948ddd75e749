"""`Spool`: memory for weights that is a file, so that the system can take pages back and none of it stays behind."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from clada_export.errors import UsageError
from clada_export.files.capacity import available_memory, disk

PAGE = mmap.PAGESIZE
LARGE = 0.25
"""Weights are large if they are more than this part of the memory that is free before they are read: the rest is for all that
later stages hold (activations, statistics, the graph that is written)."""
_LEAST = 1 << 20
"""Bytes of a file that is made because the others are full."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")


class _Part:
    """One unlinked file, mapped shared. It lives as long as the spool or a tensor on it."""

    def __init__(self, folder: Path, size: int) -> None:
        self.size, self.used = size, 0
        # A file without a name: nothing is left of it once the process ends, however it ends.
        with tempfile.TemporaryFile(prefix="clada-", dir=folder) as file:
            # All blocks now: a disk that fills up later would end the process with SIGBUS, which Python can't catch.
            os.posix_fallocate(file.fileno(), 0, size)
            self.map = mmap.mmap(file.fileno(), size)
        self.start = torch.frombuffer(self.map, dtype=torch.uint8).data_ptr()

    def offset(self, tensor: Tensor) -> int | None:
        """Where a tensor begins in it; None if it is not here."""
        offset = tensor.data_ptr() - self.start
        return offset if 0 <= offset < self.size else None


class Spool:
    """Room for tensors in files that are mapped shared and have no name.

    A page that is not used goes back to the system and comes again from the file, or from the system's cache of it: tensors
    can be larger together than the memory. They are ordinary tensors, each with a storage of its own, and may be written to.
    They keep their file alive by themselves.

    Args:
        folders: where files may lie, the best first (`folders_for_spools` by default).
    """

    def __init__(self, folders: Sequence[Path] | None = None) -> None:
        self._folders = tuple(folders) if folders is not None else None
        self._parts: list[_Part] = []
        self.large = False
        """Whether what it holds is large beside the memory, so that it should not all be there at once."""

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(part.size for part in self._parts)

    def beside(self) -> Spool:
        """Another, which may lie where this one may."""
        return Spool(self._folders)

    def reserve(self, size: int) -> None:
        """Take room on the disk before the work.

        Args:
            size: bytes, as `room` counts them.

        Raises:
            UsageError: no folder has so much; says what each has.
        """
        if size <= 0:
            return
        size = _paged(size)
        self.large = self.large or is_large(self.size + size)
        folders = self._folders if self._folders is not None else folders_for_spools()
        for folder in by_merit(folders, size):
            try:
                self._parts.append(_Part(folder, size))
            except OSError as error:
                if error.errno not in (*_NO_ROOM, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EPERM):
                    raise
            else:
                return
        found = ", ".join(f"{folder} has {_gigabytes(free_disk(folder))}" for folder in folders)
        raise UsageError(
            f"the weights need a file of {_gigabytes(size)} during the export, and there is no room for it ({found}); "
            "make room, or set TMPDIR to a folder that has it"
        )

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros or of whatever was given back.

        Raises:
            UsageError: there is no room on the disk for it.
        """
        count = 1
        for length in shape:
            count *= int(length)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        size = _paged(count * dtype.itemsize)
        part = next((part for part in self._parts if part.size - part.used >= size), None)
        if part is None:
            self.reserve(max(size, _LEAST))
            part = self._parts[-1]
        tensor = torch.frombuffer(part.map, dtype=dtype, count=count, offset=part.used)
        part.used += size
        return tensor.view(tuple(shape))

    def give_back(self, tensor: Tensor) -> None:
        """Let the room of the tensor that was taken last be taken again."""
        for part in self._parts:
            if tensor.numel() and (offset := part.offset(tensor)) is not None:
                if offset + _paged(tensor.numel() * tensor.element_size()) == part.used:
                    part.used = offset
                return

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in it."""
        return tensor.numel() > 0 and any(part.offset(tensor) is not None for part in self._parts)

    def copy(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of a tensor in it.

        Args:
            dtype: of the copy; the tensor's by default.
        """
        made = self.take(tensor.shape, dtype or tensor.dtype)
        with torch.no_grad():
            made.copy_(tensor)
        return made

    def adopt(self, model: nn.Module) -> None:
        """Move a module's parameters into it, one after the other. They stay the same parameters, so ties stay ties."""
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.numel() and not self.holds(parameter):
                parameter.data = self.copy(parameter.detach())
                self.used(parameter)

    def used(self, tensor: Tensor) -> None:
        """Say that a tensor was read or written to, and will not be again for a while: if the weights are large, it rests."""
        if self.large:
            self.pages([tensor]).rest()

    def pages(self, tensors: Iterable[Tensor]) -> Pages:
        """The pages of those of the tensors that lie in it."""
        found: dict[int, list[tuple[int, int]]] = {}
        for tensor in tensors:
            if not tensor.numel() or tensor.device.type != "cpu":
                continue
            for index, part in enumerate(self._parts):
                if (offset := part.offset(tensor)) is not None:
                    start = offset // PAGE * PAGE
                    found.setdefault(index, []).append((start, offset + tensor.numel() * tensor.element_size()))
        return Pages([(self._parts[index].map, _joined(ranges)) for index, ranges in found.items()])


class Pages:
    """Parts of mapped files.

    Args:
        ranges: of each file the first byte and the one after the last; the first on a page's border.
    """

    def __init__(self, ranges: Sequence[tuple[mmap.mmap, Sequence[tuple[int, int]]]]) -> None:
        self._ranges = tuple(ranges)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(end - start for _, ranges in self._ranges for start, end in ranges)

    def rest(self) -> None:
        """Give the memory back to the system. The contents stay in its cache or on the disk, and come back when read."""
        for file, ranges in self._ranges:
            for start, end in ranges:
                # Of a shared mapping of a file this forgets nothing: what was written is the file's.
                file.madvise(mmap.MADV_DONTNEED, start, end - start)


def is_large(size: int) -> bool:
    """Whether weights of so many bytes are large (`LARGE`) beside the memory that is free."""
    free = available_memory()
    return free is not None and size > LARGE * free


def room(tensors: Iterable[tuple[int, int]]) -> int:
    """Bytes that tensors take in a spool, each beginning on a page of its own.

    Args:
        tensors: of each the number of elements, and the bytes of one.
    """
    return sum(_paged(count * size) for count, size in tensors)


def folders_for_spools() -> tuple[Path, ...]:
    """Where the files may lie: the system's folder for temporary files (`TMPDIR`), then the others that there usually are."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folders = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path(cache), Path.cwd()]
    return tuple(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def spool_folder(size: int) -> Path | None:
    """Where a spool of so many bytes would lie, or None if there is no room for it."""
    return next(iter(by_merit(folders_for_spools(), size)), None)


def by_merit(folders: Sequence[Path], size: int) -> list[Path]:
    """The folders that have `size` bytes free: those on a disk first, those in memory only where there is no other."""
    roomy = [folder for folder in folders if free_disk(folder) >= size]
    return sorted(roomy, key=in_memory)


def free_disk(folder: Path) -> int:
    """Bytes that this user may still write there; 0 for a folder that can't be asked."""
    try:
        return disk(folder).free
    except OSError:
        return 0


def in_memory(folder: Path) -> bool:
    """Whether files in a folder are kept in memory (tmpfs), as far as the system says."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
        place = folder.resolve()
    except OSError:
        return False
    mounts = [fields for line in lines if len(fields := line.split()) > 2 and place.is_relative_to(fields[1])]
    # Of two that are mounted at one place, the later is seen.
    return bool(mounts) and max(enumerate(mounts), key=lambda pair: (len(pair[1][1]), pair[0]))[1][2] in _IN_MEMORY


def _paged(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges in order, those that touch within a page made one: fewer calls of the system."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start <= _paged(joined[-1][1]):
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
