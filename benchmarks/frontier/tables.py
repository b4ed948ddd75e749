"""What every choice for a layer costs and reads, and how a budget of bits is shared among layers.

An error e in the output of FFN l raises the model's KL to second order by 1/2 price_l^2 |e|^2 (`docs/calibration.md`). So one
price of a bit, the same in all layers, settles formats and thresholds together: each layer takes the choice with the least
1/2 price^2 |e|^2 + lambda * bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.frontier.ffn import Exact, Quantised

DROPPED = (0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85)
"""Shares of neurons below the first threshold."""
MEDIUM = (0.15, 0.3, 0.45, 0.6)
"""Shares of neurons between the two thresholds, where there are two."""
SKIPS = ("none", "one", "two")


@dataclass(frozen=True)
class Choice:
    """What a layer may do: a format (by its place in the family), two thresholds, what it reads (bits a weight), and the mean
    square of the error of the FFN's output, summed over the hidden size."""

    form: int
    drop: float
    refine: float
    bits: float
    error: float


@torch.inference_mode()
def choices(exact: Exact, forms: Sequence[tuple[int, Quantised]], x: Tensor, skip: str) -> list[Choice]:
    """All choices of a layer.

    Args:
        forms: the formats, each with its place.
        x: rows that errors are measured on [n, d], in the rotated basis.
        skip: one of `SKIPS`: no threshold, one, or two.
    """
    wanted = exact.hidden(x) @ exact.down
    everywhere, nowhere = torch.ones(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.bool)
    found = []
    for place, form in forms:
        full, high, score = form.score(x)
        ordered = score.flatten().sort().values
        for dropped, medium in _shares(skip, form):
            drop, refine = (_quantile(ordered, share) for share in (dropped, dropped + medium))
            result = form.output(full, high, score, drop, refine, everywhere if skip == "none" else nowhere)
            bits = form.bits(float(result.whole.mean()), float(result.medium.mean()))
            found.append(Choice(place, drop, refine, bits, float((result.y - wanted).square().sum(-1).mean())))
    return found


def _shares(skip: str, form: Quantised) -> list[tuple[float, float]]:
    if skip == "none":
        return [(0.0, 0.0)]
    pairs = [(dropped, 0.0) for dropped in DROPPED]
    if skip == "two" and form.low_bits:
        pairs += [(dropped, medium) for dropped in DROPPED[::2] for medium in MEDIUM if dropped + medium < 0.95]
    return pairs


def _quantile(ordered: Tensor, share: float) -> float:
    return float(ordered[min(len(ordered) - 1, round(share * len(ordered)))]) if share > 0 else 0.0


def share_out(tables: Sequence[Sequence[Choice]], prices: Sequence[float], bits: float) -> list[Choice]:
    """A choice for each layer, with about so many bits a weight on average (layers of one size), the cheapest.

    Where the target is below or above all that there is, the nearest is taken.
    """
    low, high = -60.0, 60.0
    richer, best = _at(tables, prices, math.exp(low)), _at(tables, prices, math.exp(high))
    for _ in range(60):
        middle = (low + high) / 2
        found = _at(tables, prices, math.exp(middle))
        if _mean(found) > bits:
            low, richer = middle, found
        else:
            high, best = middle, found
    # Between the two no price makes a difference; layers take the richer choice while it fits.
    for index, choice in enumerate(richer):
        tried = [*best[:index], choice, *best[index + 1 :]]
        if _mean(tried) <= bits:
            best = tried
    return best


def _mean(chosen: Sequence[Choice]) -> float:
    return sum(choice.bits for choice in chosen) / len(chosen)


def _at(tables: Sequence[Sequence[Choice]], prices: Sequence[float], lam: float) -> list[Choice]:
    return [
        min(table, key=lambda choice, price=price: 0.5 * price**2 * choice.error + lam * choice.bits)  # type: ignore[misc]
        for table, price in zip(tables, prices, strict=True)
    ]


def predicted(chosen: Sequence[Choice], prices: Sequence[float]) -> float:
    """The KL that the prices foretell: 1/2 sum price^2 |e|^2."""
    return sum(0.5 * price**2 * choice.error for choice, price in zip(chosen, prices, strict=True))
