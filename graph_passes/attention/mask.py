"""What the mask of an attention lets through: found by computing it, whatever nodes it is made of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.attention.evaluate import InterfaceValue, NotEvaluatedError

Array = npt.NDArray[np.generic]

HIDDEN = -1e4
"""What is added to the scores of hidden tokens is below this."""
FIRST, GROWTH, LONGEST = 64, 8, 1 << 18
"""Lengths at which a sliding window is looked for: the first, the factor from one to the next, the longest."""


class MaskError(Exception):
    """The mask is not one of those that are known; says why."""


def window_of(graph: ir.Graph, bias: ir.Value, longest: int | None = None) -> int | None:
    """The sliding window of a mask: a token sees itself and all before it in its row (None), or the last so many columns.

    Args:
        graph: that computes it.
        bias: what is added to scores, [1 or batch, 1, tokens, total].
        longest: tokens that the model takes at most, if it says so.

    Raises:
        MaskError: it is another mask.
    """
    value = _interface_value(graph, bias)
    window = _find_window(value, min(longest or LONGEST, LONGEST))
    for tokens, past in ((6, 0), (3, (window or 9) + 4), (1, 7), (2 * (window or 4), 1)):
        total = past + tokens
        if total > (1 << 12) + LONGEST // 32:
            continue  # a table of tokens x total; the case of one token covers such windows
        mask = np.ones((3, total), np.int64)
        mask[1, : min(4, total - 1)] = 0
        mask[2, : total - tokens // 2 - 1] = 0
        _compare(_visible(value, mask, tokens), expected(mask, tokens, window), mask, tokens)
    return window


def expected(mask: npt.NDArray[np.int64], tokens: int, window: int | None) -> npt.NDArray[np.bool_]:
    """Which columns a token may see: bool [batch, tokens, total]."""
    total = mask.shape[1]
    rows, columns = np.arange(total - tokens, total)[:, None], np.arange(total)[None]
    seen = columns <= rows
    if window is not None:
        seen &= rows - columns < window
    return np.asarray(seen[None] & (mask[:, None, :] == 1))


def clears_padding(graph: ir.Graph, condition: ir.Value) -> bool:
    """Whether a condition, bool with `tokens` numbers a row, is true of padding alone."""
    try:
        value = InterfaceValue(graph, condition)
        for tokens, past in ((6, 0), (3, 5), (1, 4)):
            mask = np.ones((2, past + tokens), np.int64)
            mask[1, : past + tokens - 2] = 0
            found = np.asarray(value(mask, tokens), bool)
            if found.size not in (tokens, 2 * tokens):
                return False
            if (np.broadcast_to(found.reshape(-1, tokens), (2, tokens)) & (mask[:, past:] == 1)).any():
                return False
    except NotEvaluatedError:
        return False
    return True


def _interface_value(graph: ir.Graph, bias: ir.Value) -> Callable[[npt.NDArray[np.int64], int], Array]:
    try:
        return InterfaceValue(graph, bias)
    except NotEvaluatedError as error:
        raise MaskError(f"its mask is not made of attention_mask alone: {error}") from error


def _find_window(value: Callable[[npt.NDArray[np.int64], int], Array], longest: int) -> int | None:
    total = min(FIRST, longest)
    while True:
        seen = _visible(value, np.ones((1, total), np.int64), 1)[0, 0]
        count = int(seen.sum())
        if count < total:
            if not count or not seen[total - count :].all():
                raise MaskError(f"its mask shows {count} of {total} tokens, and not the last ones")
            return count
        if total >= longest:
            return None
        total = min(total * GROWTH, longest)


def _visible(value: Callable[[npt.NDArray[np.int64], int], Array], mask: npt.NDArray[np.int64], tokens: int) -> Array:
    """bool [1 or batch, tokens, total]."""
    try:
        found = value(mask, tokens)
    except NotEvaluatedError as error:
        raise MaskError(f"its mask is not made of attention_mask alone: {error}") from error
    if found.ndim != 4 or found.shape[1] != 1 or found.shape[3] != mask.shape[1] or found.shape[2] not in (1, tokens):
        raise MaskError(f"its mask has the shape {list(found.shape)} for {tokens} tokens of {mask.shape[1]}")
    numbers = found.astype(np.float64)[:, 0]
    visible = numbers == 0
    if not (visible | (numbers < HIDDEN)).all():
        raise MaskError("its mask adds other numbers to scores than 0 and very small ones")
    return np.asarray(visible)


def _compare(found: Array, wanted: npt.NDArray[np.bool_], mask: npt.NDArray[np.int64], tokens: int) -> None:
    rows = mask[:, -tokens:] == 1  # what padding sees does not matter
    if not np.array_equal(np.broadcast_to(found, wanted.shape)[rows], wanted[rows]):
        raise MaskError("its mask is neither causal nor a sliding window")
