"""JSON that a stranger may have written: read within bounds, and checked against a schema.

What comes out of here is made of values that every later step can hold: no number beyond a float64, no text that can't be
written as UTF-8, no nesting that runs into Python's limits.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema

from clada_export.errors import UsageError
from clada_export.foreign import one_line

LARGEST_FILE = 32 << 20
"""Bytes. A plan with a threshold for each of a million neurons takes 20 MB; parsed, a file may take 20 times its size."""
DEEPEST = 64
"""Lists and objects inside each other. Ours have eight, and Python gives up somewhere below a thousand."""
_ERRORS = 64
"""How many faults of a file are looked at to name the best."""


def read_json(path: Path) -> Any:
    """Parse a JSON file; NaN and infinities are refused, as JSON has neither.

    Raises:
        UsageError: the file can't be read, is none (a folder, a device, a pipe), is larger than `LARGEST_FILE`, or is not JSON
            within the bounds of `require_plain`.
    """

    def refuse(token: str) -> float:
        raise ValueError(f"{token} is not JSON")

    data = read_regular(path, LARGEST_FILE)
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON: {one_line(error)}") from error
    require_plain(value, f"{path}: not valid JSON")
    return value


def read_regular(path: Path, limit: int, too_large: str = "more than it can be meant to be") -> bytes:
    """The bytes of a file, without waiting for a writer where it is a pipe.

    Args:
        limit: bytes; more are not read.
        too_large: what is said of a file that has more.

    Raises:
        UsageError: the file can't be read, is no regular file, or has more than `limit` bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise UsageError(f"{path}: can't be read: it is not a regular file")
            # It may grow while it is read; and memory is made for as much as is asked for.
            data = stream.read(found.st_size + 1) if found.st_size <= limit else None
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror or error}") from error
    except ValueError as error:  # a name with a NUL
        raise UsageError(f"{str(path)!r}: can't be read: {error}") from error
    if data is None or len(data) > limit:
        raise UsageError(f"{path}: larger than {limit >> 20} MB, which is {too_large}")
    return data


def require_plain(value: Any, origin: str) -> None:
    """Refuse what is JSON by its form but breaks those who use it.

    Raises:
        UsageError: nesting beyond `DEEPEST`, a number that is not finite, an integer that no float64 holds, or text with half
            of a surrogate pair, which no file can hold; says where.
    """
    path: list[Any] = []
    open_values = [_items({"": value})]
    while open_values:
        for key, item in open_values[-1]:
            if isinstance(key, str) and not _is_text(key):
                raise UsageError(f"{origin}: {_place(path)}: the name {key!a} is no text: half of a surrogate pair")
            if isinstance(item, dict | list | tuple):
                if not item:
                    continue
                if len(path) >= DEEPEST:
                    raise UsageError(f"{origin}: {_place(path[:4])}/...: nested too deeply (more than {DEEPEST} levels)")
                path.append(key)
                open_values.append(_items(item))
                break
            fault = _fault(item)
            if fault is not None:
                raise UsageError(f"{origin}: {_place([*path, key])}: {fault}")
        else:
            open_values.pop()
            if path:
                path.pop()


def validate_json(value: Any, schema: dict[str, Any], origin: str) -> None:
    """Check a parsed JSON value against a schema, and its numbers and text as `require_plain` does.

    An integer of the schema has to be written as one: 2.0 is none.

    Raises:
        UsageError: names the place of the first fault, the value found and what is allowed.
    """
    require_plain(value, origin)
    error = jsonschema.exceptions.best_match(islice(_Validator(schema).iter_errors(value), _ERRORS))
    if error is not None:
        raise UsageError(f"{origin}: {_place(error.absolute_path)}: {_short(error.message)}")


def _fault(item: Any) -> str | None:
    if isinstance(item, float):
        return None if math.isfinite(item) else f"{item} is not a finite number"
    if isinstance(item, str):
        return None if _is_text(item) else f"{item[:40]!a} is no text: half of a surrogate pair"
    if isinstance(item, int) and not _holds(item):
        return "an integer that is too large for any use: it has more than 308 digits"
    return None


def _holds(value: int) -> bool:
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _is_text(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _items(value: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    """What is in it, by name or place; nothing of an array of sound numbers, which may be long."""
    if isinstance(value, dict):
        return iter(value.items())
    if set(map(type, value)) <= {int, float}:
        try:
            if all(map(math.isfinite, value)):
                return iter(())
        except OverflowError:  # an integer beyond float64
            pass
    return iter(enumerate(value))


def _place(path: Iterable[Any]) -> str:
    return _short("/".join(_short(str(part), 60) for part in path).lstrip("/")) or "(top level)"


def _short(text: str, limit: int = 300) -> str:
    """Text for a message: on one line, and not the whole of a large file but how it begins and ends."""
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]} ... {text[-limit // 3 :]}"
    return " ".join(text.split())


def _each(validator: Any, items: Any, instance: Any, schema: dict[str, Any]) -> Iterator[Any]:
    """`items` of jsonschema, without a look at each of very many numbers, or at any where there are too many."""
    if not validator.is_type(instance, "array") or len(instance) > schema.get("maxItems", math.inf):
        return
    if set(items) <= {"type", "minimum", "maximum"} and items.get("type") == "number":
        low, high = items.get("minimum", -math.inf), items.get("maximum", math.inf)
        if all(type(item) in (int, float) and low <= item <= high for item in instance):
            return
    yield from jsonschema.Draft202012Validator.VALIDATORS["items"](validator, items, instance, schema)


_Validator: Any = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
    jsonschema.Draft202012Validator,
    {"items": _each},
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)
