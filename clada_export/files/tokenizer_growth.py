"""How much longer a tokenizer can make a text: what its file asks for is not bounded by the file's size.

Forty rules that write "aa" for "a" make 10^12 characters of one, and a library that runs out of memory ends the process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clada_export.errors import UsageError
from clada_export.files.json_files import require_plain
from clada_export.files.tokenizer_file import BYTE_LEVEL, check_times, prepended, replaced

MOST_SPECIAL = 100_000
"""Special tokens around a text."""
MOST_COPIES = 16
"""Of the text among them."""

_SEQUENCES = ("normalizers", "pretokenizers", "decoders", "processors")


def check_growth(tokenizer: Any, place: Path) -> None:
    """Look at the rules of a tokenizer that write something.

    Args:
        tokenizer: of the package `tokenizers`.
        place: for messages.

    Raises:
        UsageError: rules that make a text far longer (`tokenizer_file.check_times`), or very many special tokens; says which.
    """
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        check_times([_times(rule) for rule in _rules(getattr(tokenizer, name), place)], name, place)
    for rule in _rules(tokenizer.post_processor, place):
        sizes = {token: len(entry["ids"]) for token, entry in rule.get("special_tokens", {}).items()}
        pieces = rule.get("single", [])
        special = sum(sizes.get(piece["SpecialToken"]["id"], 1) for piece in pieces if "SpecialToken" in piece)
        copies = sum("Sequence" in piece for piece in pieces)
        if special > MOST_SPECIAL or copies > MOST_COPIES:
            raise UsageError(
                f"{place}: post_processor: {special} special tokens and {copies} copies of the text; at most {MOST_SPECIAL} "
                f"and {MOST_COPIES} are sane"
            )


def _rules(part: Any, place: Path) -> Iterator[dict[str, Any]]:
    """The rules of a part of a tokenizer, as its file has them; those of sequences one by one."""
    if part is None:
        return
    # The library has checked the part, and knows its form: what it writes is the rule as it will be applied.
    state = json.loads(part.__getstate__())
    require_plain(state, str(place))
    open_rules = [state]
    while open_rules:
        rule = open_rules.pop()
        inner = next((rule[name] for name in _SEQUENCES if name in rule), None)
        if inner is None:
            yield rule
        else:
            open_rules.extend(inner)


def _times(rule: dict[str, Any]) -> float:
    """Times as long as before a text can be afterwards, in bytes."""
    if rule.get("type") == "Replace":
        return replaced(rule["content"], rule["pattern"].get("String"))
    if rule.get("type") == "Prepend":
        return prepended(rule["prepend"])
    return BYTE_LEVEL if rule.get("type") == "ByteLevel" else 1.0
