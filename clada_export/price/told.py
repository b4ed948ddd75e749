"""A price in words."""

from __future__ import annotations

from collections.abc import Iterator

from clada_export.price.machine import Machine
from clada_export.price.model import WITHIN, Price


def told(price: Price, machine: Machine) -> Iterator[str]:
    """Lines for a reader: what an export costs on this machine, and what would stand in its way."""
    threads = "1 thread" if machine.threads == 1 else f"{machine.threads} threads"
    yield (
        f"export    about {duration(price.seconds)} here ({threads}, {machine.gflops:.0f} GFLOPS; within {WITHIN:g} times, "
        f"on an idle machine), {gigabytes(price.memory)} of memory at its peak, {gigabytes(price.output)} on disk"
    )
    stages = ", ".join(f"{stage.stage} {duration(stage.seconds)}" for stage in price.stages)
    yield f"          {stages}"
    if price.temporary:
        yield f"          {gigabytes(price.temporary)} more on disk until it ends, in a folder for temporary files (TMPDIR)"
    yield f"          {gigabytes(price.needed)} of the memory can't be given back; the rest are weights, read again when wanted"
    if machine.memory is not None and price.needed > machine.memory:
        yield f"short     {gigabytes(machine.memory)} of memory are available"
    disk = price.output + (price.temporary if machine.same_disk else 0)
    if machine.disk is not None and disk > machine.disk:
        yield f"short     {gigabytes(machine.disk)} are free on this disk, and {gigabytes(disk)} are needed"
    if machine.temporary is not None and not machine.same_disk and price.temporary > machine.temporary:
        yield f"short     {gigabytes(machine.temporary)} are free for temporary files, {gigabytes(price.temporary)} are needed"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as exact as an estimate is."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def gigabytes(size: float) -> str:
    """Bytes in units of 10^9."""
    return f"{size / 1e9:.2f} GB" if size < 9.95e9 else f"{size / 1e9:.0f} GB"
