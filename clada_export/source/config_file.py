"""What a model's configuration asks for, held against what is there before anything is made of it.

A count costs nothing to write into a config.json, and obeying it can take all memory or all day: transformers makes a name for
each label, a module for each layer, a matrix for each vocabulary. Whatever a number sizes has to be in the weight files.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from clada_export.errors import UsageError
from clada_export.files.capacity import available_memory

MOST_LAYERS = 2_000
MOST_ITEMS = 100_000
"""Of a list, a text, or labels: transformers makes a name for each label while it reads the configuration."""
LARGEST_SIZE = 2**53
_COUNTS = re.compile(r"(num|n)_.*(heads?|experts?|groups?)|n_head|.*_experts")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "n_embd", "ffn_dim")
_REPEATS = r"(layer|block|cycle|stack|stage)s?"
_LAYERS = re.compile(rf"(n|num|.*_num|encoder|decoder)_(.*_)?{_REPEATS}(_.*)?|.*_cycles|depth")
_DTYPES = ("dtype", "torch_dtype")
_SPARE = 4
"""How many times the stored numbers a model may have: tied weights are stored once, and shapes are compared exactly later."""
_SPARE_BYTES = 256 << 20

_CODE = ("auto_map", "custom_pipelines", "_auto_class")
"""Names of the model's own code, and what makes transformers write code into an export."""
_ELSEWHERE = ("transformers_weights", "configuration_files", "name_or_path", "_name_or_path", "_commit_hash")
"""They lead to other files than those that were checked."""
_STRUCTURE = ("attribute_map", "sub_configs", "sub_configs_defaults")
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_OWN_IMPLEMENTATIONS = ("eager", "sdpa", "grouped_mm", "batched_mm", None)
"""Those of transformers itself. Any other name is that of a package, or of native code on the Hub."""


_LEAST_ENTRY = 40
"""Bytes that a tensor takes in a pickle at least: a name, a shape, and a key."""


@dataclass(frozen=True)
class Stored:
    """What the weight files of a model hold: how many tensors, elements in all of them, and the longest axis of any."""

    tensors: int
    elements: int
    longest: int

    @classmethod
    def of(cls, shapes: Sequence[Sequence[int]]) -> Stored:
        """Of tensors with these shapes."""
        sizes = [(math.prod(shape), shape) for shape in shapes]
        # The axes of a tensor without elements cost nothing, so they say nothing.
        longest = max((max(shape, default=1) for size, shape in sizes if size), default=1)
        return cls(len(sizes), sum(size for size, _ in sizes), longest)

    @property
    def most_parts(self) -> int:
        """How many modules and parameters a model of them may have: a part that its configuration leaves out may be built."""
        return 20_000 + 8 * self.tensors

    @classmethod
    def at_most(cls, size: int) -> Stored:
        """Of files with so many bytes, whatever is in them."""
        return cls(size // _LEAST_ENTRY, size, size)


def check_config(value: Any, place: str) -> None:
    """Look at a parsed configuration before transformers does.

    Raises:
        UsageError: no JSON object, a `model_type` that is no text, a type of numbers that PyTorch has not, or a number, list or
            text beyond all bounds; says where.
    """
    if not isinstance(value, dict):
        raise UsageError(f"{place}: a JSON object is wanted, and this is {type(value).__name__}")
    for where, name, item in _entries(value):
        if name == "model_type" and not isinstance(item, str):
            raise UsageError(f"{place}: {where}: {str(item)[:60]!r} is no name of an architecture")
        if name in _DTYPES and not _is_dtype(item):
            raise UsageError(f"{place}: {where}: {str(item)[:60]!r} is no type of PyTorch's tensors")
        if isinstance(item, list | dict | str) and len(item) > MOST_ITEMS:
            raise UsageError(f"{place}: {where} has {len(item)} items or letters; at most {MOST_ITEMS} can be meant")
        # transformers writes 1e30 for "no limit" where a float may stand.
        if isinstance(item, bool) or not isinstance(item, int):
            continue
        limit = MOST_LAYERS if _LAYERS.fullmatch(name) else MOST_ITEMS if name == "num_labels" else LARGEST_SIZE
        if abs(item) > limit:
            raise UsageError(f"{place}: {where} is {_shown(item)}; at most {limit} can be meant")


def inert(value: Mapping[str, Any], kind: type[PreTrainedConfig] | None = None) -> dict[str, Any]:
    """A configuration without what is no setting of a model.

    transformers makes an attribute of *every* name, be it one of its own methods, and acts on some: it fetches native code for
    the name of an attention kernel, and loads another weight file than the usual.

    Args:
        value: a parsed configuration that `check_config` took.
        kind: what it becomes; by its `model_type` if not given.
    """
    kind = _kind(value) or kind or PreTrainedConfig
    result = {}
    for name, item in value.items():
        if name in (*_CODE, *_ELSEWHERE, *_STRUCTURE) or _is_taken(kind, name):
            continue
        if name in _IMPLEMENTATIONS and not (item is None or (isinstance(item, str) and item in _OWN_IMPLEMENTATIONS)):
            continue
        inner = getattr(kind, "sub_configs", {}).get(name) if isinstance(item, dict) else None
        result[name] = inert(item, inner) if inner is not None or (isinstance(item, dict) and _kind(item)) else item
    return result


def _kind(value: Mapping[str, Any]) -> type[PreTrainedConfig] | None:
    name = value.get("model_type")
    return CONFIG_MAPPING[name] if isinstance(name, str) and name in CONFIG_MAPPING else None


def _is_taken(kind: type, name: str) -> bool:
    """Whether the name is that of a method, or of something of Python's."""
    if name.startswith("__"):
        return True
    found = inspect.getattr_static(kind, name, None)
    return inspect.isroutine(found) or isinstance(found, classmethod | staticmethod | type)


def _is_dtype(item: Any) -> bool:
    if isinstance(item, dict):  # for each part of a model
        return all(_is_dtype(inner) for inner in item.values())
    if item is None or item == "auto":
        return True
    return isinstance(item, str) and isinstance(getattr(torch, item.removeprefix("torch."), None), torch.dtype)


def check_counts(config: PreTrainedConfig, stored: Stored, place: str) -> None:
    """Hold the counts of a configuration against the weights: a layer, head or expert has a tensor, or a place along an axis.

    Raises:
        UsageError: a count that the weights can't have; names it.
    """
    text = config.get_text_config()
    for where, name, item in _entries(text.to_dict()):
        if not isinstance(item, int) or isinstance(item, bool):
            continue
        if name == "num_hidden_layers" and item > stored.tensors:
            raise UsageError(f"{place}: {where} is {item}, and the weights hold {stored.tensors} tensors")
        if _COUNTS.fullmatch(name) and item > max(stored.longest, stored.tensors):
            raise UsageError(
                f"{place}: {where} is {_shown(item)}, and the weights hold {stored.tensors} tensors with axes of at most "
                f"{stored.longest}"
            )
        if name in _SIZES and item > stored.elements:
            raise UsageError(f"{place}: {where} is {_shown(item)}, and the weights hold {stored.elements} numbers in all")


def check_size(model: nn.Module, stored: Stored, place: str) -> None:
    """Hold a model without memory (on PyTorch's meta device) against its weight files and this machine.

    Weights lie in a file (`clada_export.decoder.spool`), so that the disk has to have room for them, not the memory.

    Raises:
        UsageError: it has many times the parameters that are stored, or its tables do not fit into memory.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > _SPARE * stored.elements + 1024:
        largest, weight = max(model.named_parameters(), key=lambda pair: pair[1].numel())
        raise UsageError(
            f"{place}: it asks for {parameters} parameters, and the weights hold {stored.elements}; the largest is {largest}, "
            f"{list(weight.shape)}"
        )
    needed, free = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()), available_memory()
    if free is not None and needed > free + _SPARE_BYTES:
        raise UsageError(
            f"{place}: the model needs {needed / 1e9:.1f} GB for tables that are made from its sizes, and {free / 1e9:.1f} GB "
            "of memory are free"
        )


def _entries(value: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every value: its path, its name and itself, at any depth; items of a list have the list's name."""
    open_values: list[tuple[str, str, Any]] = [(str(name), str(name), item) for name, item in value.items()]
    while open_values:
        where, name, item = open_values.pop()
        yield where, name, item
        if isinstance(item, Mapping):
            open_values.extend((f"{where}.{key}", str(key), inner) for key, inner in item.items())
        elif isinstance(item, list | tuple):
            open_values.extend((f"{where}.{index}", name, inner) for index, inner in enumerate(item))


def _shown(value: int) -> str:
    text = str(value)
    return text if len(text) <= 30 else f"a number of {len(text)} digits"
