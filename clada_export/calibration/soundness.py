"""Whether a model's numbers can be calibrated on: finite activations and logits, and a perplexity that can be written down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.errors import UnsupportedModelError

WORST = 1e6
"""Nats. A token that costs more, or whose cost is not a number, is taken to cost this: it is beyond every budget, and sums of
it are still numbers."""
LARGEST_LOG = 700.0
"""e^700 is the largest perplexity that is told; float64 ends at e^709."""


def perplexity(nll: float) -> float:
    """exp(mean nll), at most e^700."""
    return math.exp(min(nll, LARGEST_LOG))


def rise(difference: float) -> float:
    """exp(difference) - 1, at most e^700: how far perplexity rises."""
    return math.expm1(min(difference, LARGEST_LOG))


def bounded(nats: Tensor) -> Tensor:
    """Surprisals or KLs, none above `WORST`; NaN is as bad."""
    return nats.nan_to_num(nan=WORST, posinf=WORST).clamp(max=WORST)


def require_finite(decoder: Decoder, window: Tensor, logits: Tensor) -> None:
    """Check the logits of a window.

    Args:
        window: int64 [context].
        logits: of the dense decoder for it.

    Raises:
        UnsupportedModelError: NaN or infinite; names the first FFN that is reached by what is not finite.
    """
    if bool(torch.isfinite(logits).all()):
        return
    broken: list[str] = []

    def inner(index: int, x: Tensor, h: Tensor) -> None:
        if not bool(torch.isfinite(x).all() and torch.isfinite(h).all()):
            broken.append(decoder.ffns[index].name)

    with torch.no_grad(), decoder.tap(inner=inner):
        decoder.logits(window)
    what = f"{broken[0]}: the activations" if broken else "the model's logits"
    raise UnsupportedModelError(f"{what} are not finite on the calibration text; the model is broken in float32")


def require_perplexity(dense_nll: float) -> None:
    """Check the mean surprisal of the text, in nats.

    Raises:
        UnsupportedModelError: it is none of a language model.
    """
    if not dense_nll <= LARGEST_LOG:
        raise UnsupportedModelError(
            f"the model gives the held-out text a surprisal of {dense_nll:.3g} nats a token, so no perplexity can be told; "
            "its weights are broken or far too large"
        )


def plain(value: Any) -> Any:
    """Details for a plan: numbers that JSON does not have, such as the error of a layer whose output is 0, become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
