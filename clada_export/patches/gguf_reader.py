"""One reader a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from clada_export.patches.patch import Patch

PATCH = Patch(
    name="gguf_reader",
    package="transformers",
    made_for="5.23.0",
    reason="It maps a GGUF file and walks its header anew for the config, for the weights and for the tokenizer. With a "
    "vocabulary of 262,144 tokens (Gemma) a walk takes 10 to 15 seconds.",
    until="transformers opens one reader for all that it reads of a file",
)


@contextmanager
def one_gguf_reader() -> Iterator[None]:
    """Let every call for the reader of one file get the same reader, for as long as this lasts."""
    try:
        import gguf
    except ImportError:
        yield
        return
    original = gguf.GGUFReader
    vars(gguf)["GGUFReader"] = cache(original)
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"] = original
