"""An ONNX file as a message, before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]

from clada_export.errors import UsageError
from clada_export.files.json_files import read_regular
from clada_export.foreign import ONNX, reading

LARGEST_MESSAGE = 2**31 - 1
"""Bytes; no protobuf message can have more."""
_TOO_LARGE = "more than an ONNX file can have (2 GB at most); larger models keep their weights in files beside it"


def read_message(path: Path) -> onnx.ModelProto:
    """Parse a model file. What it says is not looked at, but for its text being text.

    Raises:
        UsageError: no file, larger than a message can be, or no message of this kind.
    """
    data = read_regular(path, LARGEST_MESSAGE, _TOO_LARGE)
    with reading(ONNX, path):
        model = onnx.ModelProto()
        model.ParseFromString(data)
    for name, text in _broken_texts(model):
        raise UsageError(f"{path}: {ONNX.fault}: a {name} is {text[:60]!r}, which is not UTF-8 text")
    return model


def _broken_texts(message: Any) -> Iterator[tuple[str, bytes]]:
    """Texts of a message that are none, with the names of their fields: protobuf gives their bytes, and nobody expects that."""
    open_messages = [message]
    while open_messages:
        for field, value in open_messages.pop().ListFields():
            if field.type == field.TYPE_MESSAGE:
                open_messages.extend([value] if isinstance(value, Message) else value)
            elif field.type == field.TYPE_STRING:
                for text in [value] if isinstance(value, str | bytes) else value:
                    if isinstance(text, bytes):
                        yield f"{field.containing_type.name}.{field.name}", text
