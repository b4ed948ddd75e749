"""Formats of our own: codes in two planes over blocks of a row. The high plane alone is a coarser weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.frontier.blocks import fit, store_plain, store_super, super_block


@dataclass(frozen=True)
class Grid:
    """A format.

    Attributes:
        high, low: bits of the two planes; low = 0: there is one plane.
        block: weights that share a scale.
        offset: a scale and an offset, or a scale alone (symmetric).
        scales: `f16` a block, or `super`: small integers over a float16 for up to 256 weights.
        search: scales by least squares over several ranges; else by the block's range.
        fit_high: scales are those of the best high plane, and the low plane divides its steps; else those of all bits.
        compensated: codes by error-compensating rounding (GPTQ, arXiv 2210.17323); else the nearest.
    """

    high: int
    low: int = 0
    block: int = 32
    offset: bool = True
    scales: str = "f16"
    search: bool = False
    fit_high: bool = False
    compensated: bool = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.high + self.low

    @property
    def name(self) -> str:
        """Says all of it: `4+2 offset super search`."""
        planes = f"{self.high}+{self.low}" if self.low else f"{self.high}"
        words = [planes, "offset" if self.offset else "symmetric", self.scales]
        words += [f"block {self.block}"] if self.block != 32 else []
        words += [word for word, there in (("search", self.search), ("fit-high", self.fit_high)) if there]
        return " ".join([*words, "compensated"] if self.compensated else words)

    def overhead(self, row: int) -> float:
        """Bits of scales and offsets, a weight, in a row of so many."""
        values = 2 if self.offset else 1
        if self.scales == "f16":
            return 16 * values / self.block
        return (12 if self.offset else 8) / self.block + 16 * values / super_block(row, self.block)

    def levels_of(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, low) of the full codes, float32 [rows, row / block], as they are stored, for weights [rows, row]."""
        bits = self.high if self.fit_high else self.bits
        scale, low = fit(weights, self.block, 1 << bits, self.offset, self.search)
        if self.scales == "f16":
            scale, low = store_plain(scale, low, self.offset, 1 << bits)
        else:
            scale, low = store_super(
                scale, low, self.offset, 1 << bits, super_block(weights.shape[1], self.block) // self.block
            )
        if self.fit_high and self.low:
            # The middles of the parts into which a step of the high plane is cut.
            parts = 1 << self.low
            scale, low = scale / parts, low - scale * (parts - 1) / (2 * parts)
        return scale, low

    def nearest(self, weights: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        """The nearest codes, uint8 [rows, row]."""
        blocks = weights.view(len(weights), -1, self.block)
        safe = torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
        codes = ((blocks - low.unsqueeze(-1)) / safe).round_().clamp_(0, (1 << self.bits) - 1)
        return codes.to(torch.uint8).view_as(weights)

    def decode(self, codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        """Float32 weights of all planes."""
        return self._decode(codes.float(), scale, low)

    def decode_high(self, codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        """Float32 weights of the high plane alone: the middle of the codes that share it."""
        part = 1 << self.low
        return self._decode((codes >> self.low).float().mul_(part).add_((part - 1) / 2), scale, low)

    def _decode(self, codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        blocks = codes.view(len(codes), -1, self.block)
        return blocks.mul_(scale.unsqueeze(-1)).add_(low.unsqueeze(-1)).view_as(codes)


def round_input(x: Tensor, block: int = 32) -> Tensor:
    """x [.., d] as the kernel's int8 says it: a scale for each block, the largest magnitude at 127."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True) / 127.0
    return (blocks / torch.where(scale == 0, 1.0, scale)).round_().mul_(scale).view_as(x)
