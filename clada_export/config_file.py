"""What a model's configuration asks for, held against what is there before anything is made of it.

A count costs nothing to write into a config.json, and obeying it can take all memory or all day: transformers makes a name for
each label, a module for each layer, a matrix for each vocabulary. Whatever a number sizes has to be in the weight files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from clada_export.errors import UsageError

MOST_LAYERS = 10_000
MOST_LABELS = 100_000
"""transformers makes a name for each while it reads the configuration."""
LARGEST_SIZE = 2**53
_COUNTS = re.compile(r"(num|n)_.*(heads?|experts?|groups?)|n_head|.*_experts")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "n_embd", "ffn_dim")
_LAYERS = re.compile(r"(n|num|.*_num|encoder|decoder)_(.*_)?layers?")
_SPARE = 4
"""How many times the stored numbers a model may have: tied weights are stored once, and shapes are compared exactly later."""
_SPARE_BYTES = 256 << 20


@dataclass(frozen=True)
class Stored:
    """What the weight files of a model hold: how many tensors, elements in all of them, and the longest axis of any."""

    tensors: int
    elements: int
    longest: int

    @classmethod
    def of(cls, shapes: Sequence[Sequence[int]]) -> Stored:
        """Of tensors with these shapes."""
        sizes = [torch.Size(shape) for shape in shapes]
        return cls(len(sizes), sum(size.numel() for size in sizes), max((max(size, default=1) for size in sizes), default=1))


def check_config(value: Any, place: str) -> None:
    """Look at a parsed configuration before transformers does.

    Raises:
        UsageError: no JSON object, a `model_type` that is no text, or a number beyond all bounds; says where.
    """
    if not isinstance(value, dict):
        raise UsageError(f"{place}: a JSON object is wanted, and this is {type(value).__name__}")
    for where, name, item in _entries(value):
        if name == "model_type" and not isinstance(item, str):
            raise UsageError(f"{place}: {where}: {str(item)[:60]!r} is no name of an architecture")
        if isinstance(item, bool) or not isinstance(item, int | float):
            continue
        limit = MOST_LAYERS if _LAYERS.fullmatch(name) else MOST_LABELS if name == "num_labels" else LARGEST_SIZE
        # transformers writes 1e30 for "no limit" where a float may stand.
        if isinstance(item, int) and abs(item) > limit:
            raise UsageError(f"{place}: {where} is {_shown(item)}; at most {limit} can be meant")


def check_counts(config: PreTrainedConfig, stored: Stored, place: str) -> None:
    """Hold the counts of a configuration against the weights: a layer, head or expert has a tensor, or a place along an axis.

    Raises:
        UsageError: a count that the weights can't have; names it.
    """
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > stored.tensors:
        raise UsageError(f"{place}: num_hidden_layers is {layers}, and the weights hold {stored.tensors} tensors")
    for where, name, item in _entries(config.to_dict()):
        if not isinstance(item, int) or isinstance(item, bool):
            continue
        if _COUNTS.fullmatch(name) and item > max(stored.longest, stored.tensors):
            raise UsageError(
                f"{place}: {where} is {_shown(item)}, and the weights hold {stored.tensors} tensors with axes of at most "
                f"{stored.longest}"
            )
        if name in _SIZES and item > stored.elements:
            raise UsageError(f"{place}: {where} is {_shown(item)}, and the weights hold {stored.elements} numbers in all")


def check_size(model: nn.Module, stored: Stored, place: str, item: int) -> None:
    """Hold a model without memory (on PyTorch's meta device) against its weight files and this machine.

    Args:
        item: bytes of a weight, once loaded.

    Raises:
        UsageError: it has many times the parameters that are stored, or it does not fit into memory.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > _SPARE * stored.elements + 1024:
        largest, weight = max(model.named_parameters(), key=lambda pair: pair[1].numel())
        raise UsageError(
            f"{place}: it asks for {parameters} parameters, and the weights hold {stored.elements}; the largest is {largest}, "
            f"{list(weight.shape)}"
        )
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    needed, free = parameters * item + buffers, free_memory()
    if free is not None and needed > free + _SPARE_BYTES:
        what = f"{parameters * item / 1e9:.1f} GB of weights and {buffers / 1e9:.1f} GB of tables that are made from its sizes"
        raise UsageError(f"{place}: the model needs {what}, and {free / 1e9:.1f} GB of memory are free")


def free_memory() -> int | None:
    """Bytes that can still be had, by the system and by the control group of this process; None if neither says."""
    found = [value for value in (_available(), *_group()) if value is not None]
    return min(found, default=None)


def _available() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) << 10 if match else None


def _group() -> Iterator[int]:
    """What is left of a container's limit."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            yield max(0, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such hierarchy, or "max"


def _entries(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every named value: its path, its name and itself, at any depth; items of a list have the list's name."""
    for name, item in value.items():
        where = f"{prefix}{name}"
        yield where, str(name), item
        if isinstance(item, Mapping):
            yield from _entries(item, f"{where}.")
        elif isinstance(item, list):
            for index, inner in enumerate(item):
                if isinstance(inner, Mapping):
                    yield from _entries(inner, f"{where}.{index}.")


def _shown(value: int) -> str:
    text = str(value)
    return text if len(text) <= 30 else f"a number of {len(text)} digits"
