"""An ONNX file as a message, before anything is made of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]

from clada_export.errors import UsageError
from clada_export.foreign import ONNX, reading

LARGEST_MESSAGE = 2**31 - 1
"""Bytes; no protobuf message can have more. Weights of larger models lie in files beside it."""


def read_message(path: Path) -> onnx.ModelProto:
    """Parse a model file. What it says is not looked at, but for its text being text.

    Raises:
        UsageError: no file, larger than a message can be, or no message of this kind.
    """
    data = _bytes(path)
    with reading(ONNX, path):
        model = onnx.ModelProto()
        model.ParseFromString(data)
    for name, text in _broken_texts(model):
        raise UsageError(f"{path}: {ONNX.fault}: a {name} is {text[:60]!r}, which is not UTF-8 text")
    return model


def _bytes(path: Path) -> bytes:
    """What is in the file; a pipe or device is not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{path} can't be read: it is not a regular file")
            if status.st_size > LARGEST_MESSAGE:
                raise UsageError(
                    f"{path} has {status.st_size / 1e9:.1f} GB, and an ONNX file can have 2 GB at most; larger models keep "
                    "their weights in files beside it"
                )
            return stream.read()
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror or error}") from error


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
