"""What a tokenizer.json asks for, held to bounds before any library reads it.

Reading it runs it: the tokens that are added pass through the normalizer. Forty rules that write "aa" for "a" make 10^12
characters of one there, and a library that runs out of memory ends the process.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clada_export.errors import UsageError
from clada_export.files.json_files import read_regular
from clada_export.foreign import TOKENIZER, reading

LARGEST = 256 << 20
"""Bytes; the largest known (Gemma) has 33 MB."""
MOST_TIMES = 1024
"""Llama's rules, the most generous that are known, may make 12 bytes of one; a regular expression counts as one that matches
between all characters, so ten that write one of them are at the bound."""
MOST_RULES = 256
LONGEST_AFFIX = 256
"""Of what is put before or after each piece of a word."""
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")


def check_tokenizer_file(path: Path) -> None:
    """`check_tokenizer` of a file.

    Raises:
        UsageError: it can't be read, has more than `LARGEST` bytes, or as `check_tokenizer`.
    """
    check_tokenizer(read_regular(path, LARGEST), path)


def check_tokenizer(data: bytes, path: Path) -> None:
    """Look at the rules of a tokenizer.json that are applied to its own tokens and to every text.

    Args:
        data: what is in it.
        path: for messages.

    Raises:
        UsageError: it is no JSON object, its rules make a text many times as long, or a table is smaller than it says; says
            which.
    """
    with reading(TOKENIZER, path):
        value = json.loads(data)
    if not isinstance(value, dict):
        raise UsageError(f"{path}: {TOKENIZER.fault}: a JSON object is wanted, and this is {type(value).__name__}")
    for part in ("normalizer", "pre_tokenizer"):
        objects = list(_objects(value.get(part)))
        _check_tables(objects, part, path)
        check_times([times for rule in objects if (times := _times(rule)) > 1 or not _is_sequence(rule)], part, path)
        if len(objects) > MOST_RULES:
            raise UsageError(f"{path}: {part}: {len(objects)} objects inside each other; at most {MOST_RULES} are sane")
    model = value.get("model")
    for name in _AFFIXES:
        affix = model.get(name) if isinstance(model, dict) else None
        if isinstance(affix, str) and len(affix) > LONGEST_AFFIX:
            raise UsageError(f"{path}: model/{name} has {len(affix)} characters; at most {LONGEST_AFFIX} are sane")


def check_times(times: Sequence[float], part: str, place: Path) -> None:
    """Hold rules that are applied one after the other to what they can make of a text together.

    Args:
        times: how many times as long each can make one.
        part: of the tokenizer, for the message.

    Raises:
        UsageError: very many rules, or very long texts.
    """
    if len(times) > MOST_RULES:
        raise UsageError(f"{place}: {part}: {len(times)} rules, one after the other; at most {MOST_RULES} are sane")
    if (product := math.prod(times)) > MOST_TIMES:
        raise UsageError(
            f"{place}: {part}: its rules can make a text {product:.3g} times as long; at most {MOST_TIMES} is sane"
        )


def replaced(content: str, text: str | None) -> float:
    """Times as long, in bytes, as a rule makes a text that writes `content` for `text`, or for a regular expression (None)."""
    # A regular expression may match a single character, or none at all.
    old, new = len((text or "").encode("utf-8", "replace")), len(content.encode("utf-8", "replace"))
    return max(1.0, new / old) if old else 1.0 + new


def prepended(text: str) -> float:
    """Times as long, in bytes, as a rule makes a text that puts this before it."""
    return 1.0 + len(text.encode("utf-8", "replace"))


BYTE_LEVEL = 2.0
"""Bytes above 127 are written as characters of two bytes each."""


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a part that is a rule, as far as one can tell: the library takes some without a type too."""
    open_values = [value]
    while open_values:
        item = open_values.pop()
        if isinstance(item, dict):
            if not item.keys() <= {"String", "Regex"}:  # a pattern
                yield item
            open_values.extend(item.values())
        elif isinstance(item, list):
            open_values.extend(item)


def _is_sequence(rule: dict[str, Any]) -> bool:
    """Whether it only holds others."""
    return any(isinstance(rule.get(name), list) for name in ("normalizers", "pretokenizers"))


def _times(rule: dict[str, Any]) -> float:
    """Times as long as before a text can be afterwards, in bytes."""
    content, prepend, table = rule.get("content"), rule.get("prepend"), rule.get("precompiled_charsmap")
    if isinstance(content, str):
        pattern = rule.get("pattern")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        return replaced(content, text if isinstance(text, str) else None)
    if isinstance(prepend, str):
        return prepended(prepend)
    if isinstance(table, str):
        return _longest(table)
    return BYTE_LEVEL if rule.get("type") == "ByteLevel" else 1.0


def _check_tables(objects: Sequence[dict[str, Any]], part: str, path: Path) -> None:
    """Compare what tables of SentencePiece say of their size with what is there: the library makes memory for it first.

    Raises:
        UsageError: there is less.
    """
    for table in (rule.get("precompiled_charsmap") for rule in objects):
        size, data = _table(table) if isinstance(table, str) else (0, b"")
        if size > len(data):
            raise UsageError(
                f"{path}: {part}: precompiled_charsmap says that its trie has {size} bytes, and {len(data)} are there"
            )


def _table(table: str) -> tuple[int, bytes]:
    """A table of SentencePiece: the size that it gives its trie, and what it has: the trie, then texts with a NUL after each.

    (0, nothing) for one that is none, which the library refuses.
    """
    try:
        data = base64.b64decode(table, validate=True)
    except ValueError:
        return 0, b""
    return int.from_bytes(data[:4], "little"), data[4:]


def _longest(table: str) -> float:
    """The longest text that a table writes for a character."""
    size, data = _table(table)
    return float(max(map(len, data[size:].split(b"\0"))) or 1)
