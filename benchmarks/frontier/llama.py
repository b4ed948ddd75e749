"""llama.cpp's formats, quantised after its reference code (ggml-quants.c) and decoded: what users have today.

A super-block of Q4_K, Q5_K and Q6_K has 256 weights. llama.cpp takes another type for rows that 256 does not divide; here
such rows get the largest super-block that does, so that the type can be compared on small models too (`bits` counts its cost).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.frontier.blocks import SUPER, as_float16, fit_weighted, super_block

NAMES = ("Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_RANGES = {
    4: tuple(0.1 * step - 1.0 for step in range(21)),
    5: tuple(0.1 * step - 0.5 for step in range(16)),
}


@dataclass(frozen=True)
class LlamaFormat:
    """One of `NAMES`."""

    name: str

    def bits(self, row: int) -> float:
        """A weight, scales counted, in a row of so many."""
        if self.name.endswith("_0"):
            return int(self.name[1]) + 0.5
        if self.name == "Q6_K":
            return 6 + 8 / 16 + 16 / super_block(row, 16)
        return int(self.name[1]) + 12 / 32 + 32 / super_block(row, 32)

    def __call__(self, weights: Tensor) -> Tensor:
        """Float32 weights [rows, row], quantised and decoded."""
        if self.name == "Q6_K":
            return _q6_k(weights)
        if self.name in ("Q4_K", "Q5_K"):
            return _q45_k(weights, int(self.name[1]))
        return _q_0(weights, int(self.name[1]))


def _q_0(weights: Tensor, bits: int) -> Tensor:
    blocks = weights.view(len(weights), -1, 32)
    if bits == 8:
        scale = blocks.abs().amax(-1, keepdim=True) / 127.0
        codes = (blocks / torch.where(scale == 0, 1.0, scale)).round()
        return (codes * as_float16(scale)).view_as(weights)
    half = 1 << (bits - 1)
    scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -half
    codes = (blocks / torch.where(scale == 0, 1.0, scale) + half + 0.5).floor().clamp(0, 2 * half - 1) - half
    return (codes * as_float16(scale)).view_as(weights)


def _importance(blocks: Tensor) -> Tensor:
    """Of a reference quantisation, which knows nothing about activations: root mean square of the block plus |w|."""
    return blocks.square().mean(-1, keepdim=True).sqrt() + blocks.abs()


def _q45_k(weights: Tensor, bits: int) -> Tensor:
    count = super_block(weights.shape[1], 32, SUPER) // 32
    blocks = weights.reshape(-1, 32)
    scale, low = fit_weighted(blocks, _importance, 1 << bits, _RANGES[bits])
    scale, low = _six_bits(scale, count), _six_bits(-low, count)
    safe = torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    codes = ((blocks + low.unsqueeze(-1)) / safe).round().clamp(0, (1 << bits) - 1)
    return (codes * scale.unsqueeze(-1) - low.unsqueeze(-1)).view_as(weights)


def _six_bits(values: Tensor, count: int) -> Tensor:
    """Integers 0..63 over a float16, for each `count` neighbours; the integers are chosen before that float16 is rounded."""
    groups = values.view(-1, count)
    largest = groups.amax(-1, keepdim=True)
    codes = (groups * torch.where(largest > 0, 63.0 / largest.clamp(min=1e-30), 0.0)).round().clamp(0, 63)
    return (codes * as_float16(largest / 63.0)).view(-1)


def _q6_k(weights: Tensor) -> Tensor:
    count = super_block(weights.shape[1], 16, SUPER) // 16
    blocks = weights.reshape(-1, 16)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    safe = torch.where(largest.abs() < 1e-15, 1.0, largest)
    importance = blocks.square()
    best: Tensor | None = None
    scale = torch.zeros(len(blocks))
    for change in (0.0, *(0.1 * step for step in range(-9, 10) if step)):
        codes = (blocks * (-(32 + change) / safe)).round().clamp(-32, 31)
        product, square = (importance * blocks * codes).sum(1), (importance * codes.square()).sum(1)
        found = product / square.clamp(min=1e-30)
        gain = product * found
        better = torch.ones_like(gain, dtype=torch.bool) if best is None else gain > best
        best = gain if best is None else torch.where(better, gain, best)
        scale = torch.where(better & (square > 0), found, scale)
    groups = scale.view(-1, count)
    peak = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    inverse = -128.0 / torch.where(peak == 0, 1.0, peak)
    small = (groups * inverse).round().clamp(max=127)
    scale = (small * as_float16(1.0 / inverse)).view(-1, 1)
    codes = (blocks / torch.where(scale == 0, 1.0, scale)).round().clamp(-32, 31)
    return (codes * scale).view_as(weights)
