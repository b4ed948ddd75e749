"""What a tokenizer.json asks for, held to bounds before any library reads it.

Reading it runs it: the tokens that are added pass through the normalizer. Forty rules that write "aa" for "a" make 10^12
characters of one there, and a library that runs out of memory ends the process.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clada_export.errors import UsageError
from clada_export.foreign import TOKENIZER, reading
from clada_export.json_files import read_regular

LARGEST = 256 << 20
"""Bytes; the largest known (Gemma) has 33 MB."""
MOST_TIMES = 1024
"""As in `runtime.tokenizer_growth`: Llama's rules, the most generous that are known, may make 12 bytes of one."""
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
        UsageError: it is no JSON object, or its rules make a text many times as long; says which.
    """
    with reading(TOKENIZER, path):
        value = json.loads(data)
    if not isinstance(value, dict):
        raise UsageError(f"{path}: a JSON object is wanted, and this is {type(value).__name__}")
    for part in ("normalizer", "pre_tokenizer"):
        times = list(map(_times, _objects(value.get(part))))
        if len(times) > MOST_RULES:
            raise UsageError(f"{path}: {part}: {len(times)} rules, one after the other; at most {MOST_RULES} are sane")
        if (product := math.prod(times)) > MOST_TIMES:
            raise UsageError(
                f"{path}: {part}: its rules can make a text {product:.3g} times as long; at most {MOST_TIMES} is sane"
            )
    model = value.get("model")
    for name in _AFFIXES:
        affix = model.get(name) if isinstance(model, dict) else None
        if isinstance(affix, str) and len(affix) > LONGEST_AFFIX:
            raise UsageError(f"{path}: model/{name} has {len(affix)} characters; at most {LONGEST_AFFIX} are sane")


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


def _times(rule: dict[str, Any]) -> float:
    """Times as long as before a text can be afterwards, in bytes."""
    content, prepend, table = rule.get("content"), rule.get("prepend"), rule.get("precompiled_charsmap")
    if isinstance(content, str):
        pattern = rule.get("pattern")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        # A regular expression may match a single character, or none at all.
        old = len(text.encode("utf-8", "replace")) if isinstance(text, str) else 0
        new = len(content.encode("utf-8", "replace"))
        return max(1.0, new / old) if old else 1.0 + new
    if isinstance(prepend, str):
        return 1.0 + len(prepend.encode("utf-8", "replace"))
    if isinstance(table, str):
        return _longest(table)
    # It writes bytes above 127 as characters of two bytes each.
    return 2.0 if rule.get("type") == "ByteLevel" else 1.0


def _longest(table: str) -> float:
    """The longest text that a table of SentencePiece writes for a character: a trie, then the texts with a NUL after each."""
    try:
        data = base64.b64decode(table, validate=True)
        (size,) = struct.unpack_from("<I", data)
    except (binascii.Error, ValueError, struct.error):
        return 1.0  # the library refuses it
    return float(max(map(len, data[4 + size :].split(b"\0")), default=1) or 1)
