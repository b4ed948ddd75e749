"""What routers of merged experts are trained on: pairs of neighbouring segments of the calibration text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.errors import UsageError

SEGMENT = 32
"""Tokens of a segment in training. Lory's are 256; shorter ones give more of them from the little text of a calibration."""


@dataclass(frozen=True)
class Segments:
    """For every FFN and P pairs of neighbouring segments, float32: `means` [P, d], the mean input over the first segment, and
    `inputs` [P, r, d], inputs of r tokens of the second."""

    means: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        """P r, the tokens."""
        return self.inputs[0].shape[0] * self.inputs[0].shape[1]


def collect_segments(
    decoder: Decoder,
    windows: Tensor,
    rows: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Segments:
    """Cut the windows into segments, run the dense model once, and keep what the routers are trained on.

    Args:
        windows: int64 [W, context].
        rows: at most about so many tokens altogether, at least one a pair.
        seed: of the choice of tokens.

    Raises:
        UsageError: too little text for two pairs of segments, or an input that is not finite; names the layer.
    """
    count, context = windows.shape
    length = max(1, min(SEGMENT, context // 8))
    pairs = context // length - 1
    if pairs * count < 2:
        raise UsageError(f"merging experts: {count} windows of {context} tokens hold no two pairs of segments; give more text")
    taken = max(1, min(length, rows // (pairs * count)))
    generator = torch.Generator().manual_seed(seed)
    ffns = decoder.ffns
    means: list[list[Tensor]] = [[] for _ in ffns]
    inputs: list[list[Tensor]] = [[] for _ in ffns]
    places = torch.empty(0, dtype=torch.int64)

    def inner(index: int, x: Tensor, h: Tensor) -> None:
        segments = x.reshape(-1, x.shape[-1])[: (pairs + 1) * length].float().reshape(pairs + 1, length, -1)
        if not bool(torch.isfinite(segments).all()):
            raise UsageError(f"{ffns[index].name}: its inputs are not finite on the calibration text")
        means[index].append(segments[:-1].mean(1))
        inputs[index].append(segments[1:].gather(1, places.unsqueeze(-1).expand(-1, -1, segments.shape[-1])))

    with torch.no_grad(), decoder.tap(inner=inner):
        for done, window in enumerate(windows):
            places = torch.rand(pairs, length, generator=generator).argsort(1)[:, :taken]
            decoder.logits(window)
            progress(done + 1, count)
    return Segments(tuple(torch.cat(parts) for parts in means), tuple(torch.cat(parts) for parts in inputs))
