"""How much longer a tokenizer can make a text: what its file asks for is not bounded by the file's size.

Forty rules that write "aa" for "a" make 10^12 characters of one, and a library that runs out of memory ends the process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clada_export.errors import UsageError
from clada_export.json_files import require_plain

MOST_TIMES = 1024
"""Llama's rules, the most generous that are known, may make 12 bytes of one; a regular expression counts as one that matches
between all characters, so ten that write one of them are at the bound."""
MOST_RULES = 256
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
        UsageError: rules that make a text more than `MOST_TIMES` as long, or very many special tokens; says which.
    """
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        rules = list(_rules(getattr(tokenizer, name), place))
        if len(rules) > MOST_RULES:
            raise UsageError(f"{place}: {name}: {len(rules)} rules, one after the other; at most {MOST_RULES} are sane")
        times = math.prod(map(_times, rules))
        if times > MOST_TIMES:
            raise UsageError(
                f"{place}: {name}: its rules can make a text {times:.3g} times as long; at most {MOST_TIMES} is sane"
            )
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
        new, pattern = len(rule["content"].encode()), rule["pattern"]
        # A regular expression may match a single character, or none at all.
        old = len(pattern["String"].encode()) if "String" in pattern else 0
        return max(1.0, new / old) if old else 1.0 + new
    if rule.get("type") == "Prepend":
        return 1.0 + len(rule["prepend"].encode())
    # It writes bytes above 127 as characters of two bytes each.
    return 2.0 if rule.get("type") == "ByteLevel" else 1.0
