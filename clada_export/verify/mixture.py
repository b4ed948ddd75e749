"""What rounding may cost an imported mixture of experts: measured, by moving the eager model as rounding would.

A router amplifies rounding, and where its k-th and next logit are as close as that, engine and eager model may run different
experts; both are right, and from that token on they differ by more than rounding. So positions are compared up to the first
such tie, and by mean KL after it. (Our own derivation.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clada_export.decoder.decoder import Decoder
from clada_export.source.mixtures.routed_mlp import RoutedMLP, routed_mlps

NUDGE = 2.0**-22
"""Of the root mean square of a mixture's output: what is added to it, as two roundings of float32 would."""
TIE = 10.0
"""A gap below so many times what the nudge moves a router's logits is a tie: sums in another order may move them by more."""
NUDGES = 2
AFTER_A_TIE_KL = 0.02
"""Nats: what the mean KL after a tie may be. On SmolLM2-135M with random routers it is some 0.003."""


@dataclass(frozen=True)
class MixtureRounding:
    """Of one row: how many leading positions come before a tie, and the largest change of a logit among them."""

    settled: int
    logits: float


def has_mixtures(decoder: Decoder) -> bool:
    """Whether any of its layers is a mixture of experts."""
    return bool(routed_mlps(decoder.module))


def measure_mixture(decoder: Decoder, row: Sequence[int], seed: int = 0) -> MixtureRounding | None:
    """Run a row as it is, and some times with every mixture's output moved by rounding.

    Returns:
        None if the decoder has no mixtures.
    """
    mixtures = list(routed_mlps(decoder.module).values())
    if not mixtures:
        return None
    clean, exact = _run(decoder, mixtures, row, None)
    gaps = [_gap(logits, mixture) for logits, mixture in zip(exact, mixtures, strict=True)]
    tie = torch.zeros(len(row), dtype=torch.bool)
    moved = torch.zeros(len(row))
    for index in range(NUDGES):
        nudged, routed = _run(decoder, mixtures, row, torch.Generator().manual_seed(seed + index))
        moved = torch.maximum(moved, (nudged - clean).abs().amax(-1))
        for gap, before, after in zip(gaps, exact, routed, strict=True):
            tie |= gap < TIE * (after - before).abs().amax(-1)
    places = tie.nonzero()
    settled = int(places[0]) if len(places) else len(row)
    return MixtureRounding(settled, float(moved[:settled].max()) if settled else 0.0)


def _run(
    decoder: Decoder, mixtures: Sequence[RoutedMLP], row: Sequence[int], noise: torch.Generator | None
) -> tuple[Tensor, list[Tensor]]:
    """The model's logits [T, V], and those of every router [T, E]."""
    routed: list[Tensor] = []

    def hook(mixture: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        assert isinstance(mixture, RoutedMLP)
        routed.append(mixture.logits(args[0])[0])
        if noise is None:
            return None
        size = output.float().square().mean(-1, keepdim=True).sqrt() * NUDGE
        return output + (torch.randn(output.shape, generator=noise) * size).to(output.dtype)

    handles = [mixture.register_forward_hook(hook) for mixture in mixtures]
    try:
        with torch.inference_mode():
            logits = decoder.logits(torch.tensor(list(row))).float()
    finally:
        for handle in handles:
            handle.remove()
    return logits, routed


def _gap(logits: Tensor, mixture: RoutedMLP) -> Tensor:
    """How far the last chosen expert is above the first that is not, [T]; infinite where all are chosen."""
    k = mixture.router.k
    if k is None or k >= logits.shape[-1]:
        return torch.full(logits.shape[:-1], float("inf"))
    best = logits.topk(k + 1, dim=-1).values
    return best[..., k - 1] - best[..., k]
