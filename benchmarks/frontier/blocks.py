"""Uniform quantisers over blocks of a row: how scale and offset are found, and how they are stored.

A block's weights are `low + scale * code`, code = 0 .. levels - 1. With a symmetric grid low = -scale * levels / 2, so that one
code means zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Weights that are fitted at a time: the passes over them stay in the processor's cache."""
SUPER = 256
"""Weights that share the scale of their blocks' scales, at most."""
SEARCH = tuple(0.15 * step - 0.9 for step in range(13))
"""By how many levels the range is made smaller or larger while a scale is searched."""


def super_block(row: int, block: int, limit: int = SUPER) -> int:
    """The largest whole number of blocks that divides a row and has at most `limit` weights."""
    blocks = row // block
    return block * max(count for count in range(1, limit // block + 1) if blocks % count == 0)


def fit(weights: Tensor, block: int, levels: int, offset: bool, search: bool) -> tuple[Tensor, Tensor]:
    """(scale, low), float32 [rows, row / block], of weights [rows, row]; not yet rounded to how they are stored.

    Args:
        search: least squares over several ranges and the codes that follow from each, as llama.cpp's `make_qkx2_quants` and
            `make_qx_quants` do it, with equal weights; else the range of the block.
    """
    fitter = (_search_offset if search else _range_offset) if offset else (_search_signed if search else _range_signed)
    parts = [fitter(part, levels) for part in _chunks(weights.reshape(-1, block))]
    scale, low = (torch.cat(column).view(len(weights), -1) for column in zip(*parts, strict=True))
    return scale, low


def fit_weighted(
    blocks: Tensor, importance: Callable[[Tensor], Tensor], levels: int, ranges: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """The search of llama.cpp's `make_qkx2_quants`: an offset that is at most 0, errors weighed by importance.

    Args:
        blocks: [n, block].
        importance: of the weights of some blocks, of the same shape.
        ranges: see `SEARCH`.

    Returns:
        (scale, low), [n].
    """
    parts = [_search_offset(part, levels, importance(part), ranges, True) for part in _chunks(blocks)]
    scale, low = (torch.cat(column) for column in zip(*parts, strict=True))
    return scale, low


def _chunks(blocks: Tensor) -> Iterator[Tensor]:
    yield from torch.split(blocks, max(1, CHUNK // blocks.shape[1]))


def _range_offset(blocks: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    low, high = blocks.aminmax(dim=1)
    return (high - low) / (levels - 1), low


def _largest(blocks: Tensor) -> Tensor:
    """The weight of the largest magnitude, with its sign, [n, 1]."""
    return blocks.gather(1, blocks.abs().argmax(1, keepdim=True))


def _range_signed(blocks: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    # The largest weight gets the code that has no opposite, whatever its sign is: one level more is used.
    scale = _largest(blocks)[:, 0] / -(levels // 2)
    return scale, -scale * (levels // 2)


def _search_signed(blocks: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    half = levels // 2
    largest = _largest(blocks)
    safe = torch.where(largest == 0, 1.0, largest)
    best = torch.full((len(blocks),), -1.0)
    scale = torch.zeros(len(blocks))
    for change in SEARCH:
        codes = (blocks * (-(half + change) / safe)).round_().clamp_(-half, half - 1)
        product, square = (blocks * codes).sum(1), codes.square().sum(1)
        gain = torch.where(square > 0, product.square() / square.clamp(min=1e-30), 0.0)
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better & (square > 0), product / square.clamp(min=1e-30), scale)
    return scale, -scale * half


def _search_offset(
    blocks: Tensor,
    levels: int,
    importance: Tensor | None = None,
    ranges: tuple[float, ...] = SEARCH,
    not_above_zero: bool = False,
) -> tuple[Tensor, Tensor]:
    low, high = blocks.aminmax(dim=1, keepdim=True)
    if not_above_zero:
        low = low.clamp(max=0.0)
    weight = torch.ones_like(blocks) if importance is None else importance
    span = (high - low).clamp(min=1e-20)
    total, first = weight.sum(1, keepdim=True), (weight * blocks).sum(1, keepdim=True)
    best_scale, best_low = (high - low) / (levels - 1), low
    best: Tensor | None = None
    for change in (None, *ranges):
        codes = ((blocks - low) * (((change or 0.0) + levels - 1) / span)).round_().clamp_(0, levels - 1)
        scale, base = best_scale, best_low
        if change is not None:
            weighted = weight * codes
            sum_l, sum_ll = weighted.sum(1, keepdim=True), (weighted * codes).sum(1, keepdim=True)
            sum_xl = (weighted * blocks).sum(1, keepdim=True)
            determinant = total * sum_ll - sum_l.square()
            solvable = determinant > 0
            determinant = torch.where(solvable, determinant, 1.0)
            scale = torch.where(solvable, (total * sum_xl - first * sum_l) / determinant, best_scale)
            base = torch.where(solvable, (sum_ll * first - sum_l * sum_xl) / determinant, best_low)
            if not_above_zero:
                above = solvable & (base > 0)
                scale = torch.where(above, sum_xl / sum_ll.clamp(min=1e-30), scale)
                base = torch.where(above, 0.0, base)
        error = (codes.mul_(scale).add_(base).sub_(blocks).square_().mul_(weight)).sum(1, keepdim=True)
        better = torch.ones_like(error, dtype=torch.bool) if best is None else error < best
        best = error if best is None else torch.where(better, error, best)
        best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, base, best_low)
    return best_scale[:, 0], best_low[:, 0]


def as_float16(values: Tensor) -> Tensor:
    """Rounded to float16, clamped to its range."""
    return values.clamp(-65504.0, 65504.0).half().float()


def store_plain(scale: Tensor, low: Tensor, offset: bool, levels: int) -> tuple[Tensor, Tensor]:
    """Scale, and offset if there is one, as float16 a block."""
    scale = as_float16(scale)
    return scale, as_float16(low) if offset else -scale * (levels // 2)


def store_super(scale: Tensor, low: Tensor, offset: bool, levels: int, count: int) -> tuple[Tensor, Tensor]:
    """Scales as small integers, with float16 scales for each `count` blocks.

    With an offset 6 bits a block for each of both, as in Q4_K: the scale is at least 0 and the offset at most 0. Without,
    8 bits with a sign, as in Q6_K.
    """
    if not offset:
        scale = _integers(scale, 127, count)
        return scale, -scale * (levels // 2)
    return _integers(scale.clamp(min=0.0), 63, count), -_integers((-low).clamp(min=0.0), 63, count)


def _integers(values: Tensor, largest: int, count: int) -> Tensor:
    groups = values.view(len(values), -1, count)
    unit = as_float16(groups.abs().amax(-1, keepdim=True) / largest)
    codes = (groups / torch.where(unit == 0, 1.0, unit)).round().clamp(-largest, largest)
    return (codes * unit).view_as(values)
