"""One reader a GGUF file, which lists a vocabulary quickly."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from transformers.integrations.gguf import reader

from clada_export.patches.patch import Patch

PATCH = Patch(
    name="gguf_reader",
    package="transformers",
    made_for="5.23.0",
    reason="It maps a GGUF file and walks its header anew for the config, for the weights and for the tokenizer; and gguf 0.19 "
    "cuts each entry of a vocabulary out of a np.memmap by steps that cost microseconds each. With 262,144 tokens (Gemma) a "
    "walk takes 10 to 15 seconds.",
    until="transformers opens one reader for all that it reads of a file, and gguf cuts entries out of a plain array",
)

_NUMBER, _LENGTH = struct.Struct("<I"), struct.Struct("<Q")


class QuickArrays:
    """Goes before gguf's reader: the same parts of arrays, cut out of a plain array."""

    data: Any
    byte_order: str
    gguf_scalar_to_np: Any

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        from gguf.constants import GGUFValueType

        plain = self.data.view(np.ndarray)
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return self._slowly(orig_offs, raw_type)
        kind = GGUFValueType(_NUMBER.unpack_from(plain, orig_offs)[0])
        count = _LENGTH.unpack_from(plain, orig_offs + 4)[0]
        start = orig_offs + 12
        parts: list[Any] = [plain[orig_offs : orig_offs + 4].view(np.uint32), plain[orig_offs + 4 : start].view(np.uint64)]
        types = [GGUFValueType.ARRAY, kind] if count else [GGUFValueType.ARRAY]
        if (scalar := self.gguf_scalar_to_np.get(kind)) is not None:
            size = count * np.dtype(scalar).itemsize
            values = plain[start : start + size].view(scalar)
            parts += [values[index : index + 1] for index in range(len(values))]
            return 12 + size, parts, list(range(2, len(parts))), types
        if kind != GGUFValueType.STRING:
            return self._slowly(orig_offs, raw_type)
        for _ in range(count):
            length = _LENGTH.unpack_from(plain, start)[0]
            parts += (plain[start : start + 8].view(np.uint64), plain[start + 8 : start + 8 + length])
            start += 8 + length
        return start - orig_offs, parts, list(range(3, len(parts), 2)), types

    def _slowly(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        parts: Any = super()
        result: tuple[int, list[Any], list[int], list[Any]] = parts._get_field_parts(orig_offs, raw_type)
        return result


@contextmanager
def one_gguf_reader() -> Iterator[None]:
    """Let every call for the reader of one file get the same reader, for as long as this lasts."""
    try:
        import gguf
    except ImportError:
        yield
        return
    original, mapped = gguf.GGUFReader, vars(reader)["_mapped"]
    vars(gguf)["GGUFReader"] = cache(type("GGUFReader", (QuickArrays, original), {}))
    # transformers' own walks, for the tokenizer and for whether it keeps blocks, cut a np.memmap too.
    vars(reader)["_mapped"] = lambda path: mapped(path).view(np.ndarray)
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"], vars(reader)["_mapped"] = original, mapped
