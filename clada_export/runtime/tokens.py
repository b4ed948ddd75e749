"""Token ids as callers give them, as integers: nothing else is taken for one."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clada_export.errors import UsageError, shown

LARGEST_ID = 2**31 - 1
"""Where a model does not say how many tokens it has."""


def token_ids(values: Any, what: str, vocabulary: int | None) -> list[int]:
    """One list of token ids.

    Args:
        values: Python's or NumPy's integers, a NumPy array or a tensor of them, with one axis.
        what: for the message.
        vocabulary: how many tokens the model has, or None if it does not say.

    Raises:
        UsageError: something else, or an id that the model does not have.
    """
    ids = _integers(values)
    if ids is None:
        raise UsageError(f"{what} is not a list of token ids (whole numbers): {shown(values)}")
    most = LARGEST_ID if vocabulary is None else vocabulary - 1
    if ids and not 0 <= min(ids) <= max(ids) <= most:
        bad = next(token for token in ids if not 0 <= token <= most)
        raise UsageError(f"{what}: token id {shown(bad)} is out of range; the model has ids 0 to {most}")
    return ids


def require_text(text: str, what: str) -> None:
    """Check that a text can be written as UTF-8. Arguments of a program that are not come with halves of surrogate pairs.

    Raises:
        UsageError: it can't.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} is no UTF-8 text: character {error.start + 1} is half of a surrogate pair ({text[error.start]!a})"
        ) from error


def rows_of(values: Any) -> list[Any]:
    """The rows of a batch.

    Raises:
        UsageError: it is no list of anything, or an empty one.
    """
    if hasattr(values, "__array__"):
        values = list(np.atleast_1d(np.asarray(values)))
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise UsageError(f"prompts are {shown(values)}; give a list with one list of token ids for each")
    rows = list(values)
    if not rows:
        raise UsageError("no prompt; give at least one")
    return rows


def left_pad(rows: list[list[int]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens and mask, both [B, S]; padding has token 0 and mask 0."""
    width = max(len(row) for row in rows)
    tokens = np.zeros((len(rows), width), np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        tokens[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return tokens, mask


def _integers(values: Any) -> list[int] | None:
    """Python integers; None if one of the values is none, or they have more or fewer axes than one."""
    if hasattr(values, "__array__"):
        array = np.asarray(values)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            return None
        return [int(value) for value in array]
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        return None
    found = []
    for value in values:
        if type(value) is not int:
            if isinstance(value, bool | np.bool_):
                return None
            try:
                value = operator.index(value)
            except (TypeError, ValueError):
                return None
        found.append(value)
    return found
