"""Choose the codes and scales of a matrix for QuantMatMul, by rounding to the nearest or by a search over scales.

A block of 32 weights with q = code - 2^(bits - 1) stands for scale * q, or for scale * q + offset. Scales are rounded to
float16 before codes are chosen, so codes are the best for the scales that are stored.

Notation: N rows and K columns of the matrix, B = K / 32 blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from graph_passes.quant.contract import BLOCK, OP_TYPE
from graph_passes.quant.layout import QuantisedMatrix
from graph_passes.quant.op import ContractError

_BLOCKS_AT_ONCE = 2048  # 256 KB of float32: what a candidate reads and writes stays in a core's cache
_MOST = float(np.finfo(np.float16).max)
SEARCH = (-0.7, -0.35, 0.0, 0.35, 0.7)
"""By how much the largest weight's code is moved from the end of its range, in codes, for each candidate."""


def quantise(
    weight: np.ndarray,
    bits: int,
    *,
    has_offset: bool = False,
    search: bool = False,
    importance: np.ndarray | None = None,
    threads: int = 1,
) -> QuantisedMatrix:
    """Quantise a matrix.

    Args:
        weight: float [N, K], finite; K a multiple of 32.
        bits: of a code: 4, 5, 6 or 8.
        has_offset: an offset beside each scale: for blocks that do not lie around 0. Without one, 4 to 6 bits have a signed
            scale, by which the largest magnitude always gets the end of the range that is one longer.
        search: try some scales a block, each refined by least squares, and take the one with the least squared error; otherwise
            the scale follows from the block's largest magnitude, or from its range.
        importance: float [K], by which the search weighs squared errors of a column, such as the mean square of its input; at
            least 0, equal for all columns by default.
        threads: that work on it.

    Raises:
        ContractError: a shape that blocks do not divide, a number that is not finite, or importance of another size.
    """
    if weight.ndim != 2 or weight.shape[1] % BLOCK or weight.shape[1] == 0 or weight.shape[0] == 0:
        raise ContractError(f"{OP_TYPE}: the matrix is {list(weight.shape)}; wanted [N, K], K a multiple of {BLOCK}")
    rows, columns = weight.shape
    blocks = columns // BLOCK
    if importance is not None and (importance.shape != (columns,) or not (importance >= 0).all()):
        raise ContractError(
            f"{OP_TYPE}: importance is {list(importance.shape)}; wanted numbers of at least 0 for {columns} columns"
        )
    codes = np.empty((rows, columns), np.uint8)
    scale = np.empty((rows, blocks), np.float16)
    offset = np.empty((rows, blocks), np.float16) if has_offset else None
    fit = _Fit(bits, has_offset, SEARCH if search else (0.0,), search)
    step = max(1, _BLOCKS_AT_ONCE // blocks)

    def part(first: int) -> None:
        chosen = slice(first, first + step)
        values = weight[chosen].astype(np.float32).reshape(-1, BLOCK)
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values.reshape(-1, columns)))[0]
            found = values.reshape(-1, columns)[row, column]
            raise ContractError(
                f"{OP_TYPE}: the weight at row {first + row}, column {column} is {found}; wanted finite numbers"
            )
        weighing = None
        if importance is not None:
            by_block = importance.astype(np.float32).reshape(1, blocks, BLOCK)
            weighing = np.broadcast_to(by_block, (len(values) // blocks, blocks, BLOCK)).reshape(-1, BLOCK)
        with np.errstate(over="ignore"):  # an error of a weight near float32's largest
            found_codes, found_scale, found_offset = fit(values, weighing)
        codes[chosen] = found_codes.reshape(-1, columns)
        scale[chosen] = found_scale.reshape(-1, blocks)
        if offset is not None:
            offset[chosen] = found_offset.reshape(-1, blocks)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for _ in pool.map(part, range(0, rows, step)):
            pass
    return QuantisedMatrix(codes, scale, bits, offset)


class _Fit:
    """Codes, scales and offsets of blocks [n, 32]."""

    def __init__(self, bits: int, has_offset: bool, candidates: Sequence[float], refine: bool) -> None:
        self.zero, self.bits, self.has_offset = 1 << (bits - 1), bits, has_offset
        self.candidates, self.refine = candidates, refine

    def __call__(self, values: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """uint8 [n, 32], float16 [n] and [n]; without importance, all columns are alike."""
        start = self._around_range if self.has_offset else self._around_largest
        best: tuple[np.ndarray, np.ndarray] | None = None
        least: np.ndarray | None = None
        for move in self.candidates:
            scale, offset = start(values, move)
            if not self.refine:
                best = _half(scale), _half(offset)
                break
            q = self._round(values, scale, offset)
            scale, offset = (self._line if self.has_offset else self._slope)(values, q, importance, scale, offset)
            scale, offset = _half(scale), _half(offset)
            # The codes are those of the scale before; the nearest of the chosen one are only better.
            q *= scale[:, None]
            if self.has_offset:
                q += offset[:, None]
            q -= values
            error = np.einsum("nk,nk->n", q, q if importance is None else q * importance)
            if best is None or least is None:
                best, least = (scale, offset), error
                continue
            better = error < least
            least = np.where(better, error, least)
            best = np.where(better, scale, best[0]), np.where(better, offset, best[1])
        assert best is not None
        q = self._round(values, *best)
        q += np.float32(self.zero)
        return q.astype(np.uint8), best[0].astype(np.float16), best[1].astype(np.float16)

    def _around_largest(self, values: np.ndarray, move: float) -> tuple[np.ndarray, np.ndarray]:
        """Scales by which the largest magnitude gets the code `zero + move` from the middle.

        In 8 bits it is the shorter end of the range, so that both signs fit: 1 of 128 is not worth a clipped weight.
        """
        negative = values.min(axis=1)
        positive = values.max(axis=1)
        if self.bits == 8:
            return np.maximum(-negative, positive) / np.float32(self.zero - 1 + move), np.zeros(len(values), np.float32)
        largest = np.where(-negative > positive, negative, positive)
        return largest / np.float32(-(self.zero + move)), np.zeros(len(values), np.float32)

    def _around_range(self, values: np.ndarray, move: float) -> tuple[np.ndarray, np.ndarray]:
        low, high = values.min(axis=1), values.max(axis=1)
        # Halves: the range of two float32 can be more than one.
        half = (high * np.float32(0.5) - low * np.float32(0.5)) / np.float32((1 << self.bits) - 1 + 2 * move)
        scale = half * np.float32(2)
        return scale, low * np.float32(0.5) + high * np.float32(0.5) + half

    def _round(self, values: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """q, float32 [n, 32]; 0 where the scale is 0."""
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=np.abs(scale) > 1e-30)
        q: np.ndarray = values - offset[:, None] if self.has_offset else values.copy()
        q *= inverse[:, None]
        np.rint(q, out=q)
        np.clip(q, -self.zero, self.zero - 1, out=q)
        return q

    def _slope(
        self, values: np.ndarray, q: np.ndarray, importance: np.ndarray | None, scale: np.ndarray, offset: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The scale of least squares for these codes."""
        weighed = q if importance is None else importance * q
        over, under = np.einsum("nk,nk->n", weighed, values), np.einsum("nk,nk->n", weighed, q)
        return np.divide(over, under, out=scale.copy(), where=under > 0), offset

    def _line(
        self, values: np.ndarray, q: np.ndarray, importance: np.ndarray | None, scale: np.ndarray, offset: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The scale and offset of least squares for these codes."""
        weighed = q if importance is None else importance * q
        count = np.full(len(q), BLOCK, np.float32) if importance is None else importance.sum(axis=1)
        sums = [count, weighed.sum(axis=1)]
        squares = np.einsum("nk,nk->n", weighed, q)
        values_sum = values.sum(axis=1) if importance is None else np.einsum("nk,nk->n", importance, values)
        both = np.einsum("nk,nk->n", weighed, values)
        under = sums[0] * squares - sums[1] * sums[1]
        good = under > 1e-3 * sums[0] * squares
        slope = np.divide(sums[0] * both - sums[1] * values_sum, under, out=scale.copy(), where=good)
        base = np.divide(values_sum - slope * sums[1], sums[0], out=offset.copy(), where=good)
        return slope, np.where(good, base, offset)


def _half(values: np.ndarray) -> np.ndarray:
    """Rounded to float16, within its range; as float32."""
    rounded: np.ndarray = np.clip(values, -_MOST, _MOST).astype(np.float16).astype(np.float32)
    return rounded
