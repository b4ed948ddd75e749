"""How much an error in one FFN's output costs at the model's output.

To second order, an error e_l in the output of FFN l raises KL(dense || sparse) by 1/2 E[(g_l . e_l)^2], where g_l is the
gradient of log p(y) with respect to that output and y is drawn from the model's own distribution (the Fisher information). For
errors without a preferred direction that is 1/2 E|g_l|^2 / d * |e_l|^2, so the root mean square of g_l is the price of a unit
of error.

A model without gradients is asked in another way: small normal noise of a known size is added to one FFN's output, and the KL
that this makes is solved for the price.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clada_export.calibration.precision import products
from clada_export.calibration.saved import SavedInFile
from clada_export.calibration.soundness import require_finite
from clada_export.decoder.decoder import Decoder
from clada_export.errors import UnsupportedModelError

NOISE = 0.03
"""Of the root mean square of an FFN's output: small enough for the second order to hold, and far above rounding."""
STRIDE = 7919
"""Between the seeds of two windows."""
SAVED_LIMIT = 512 * 2**20
"""Bytes that a window's backward pass keeps in memory; what is beyond, which grows with the model's depth, goes to a file."""


def layer_sensitivity(
    decoder: Decoder,
    windows: Tensor,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    fast: bool = False,
) -> tuple[float, ...]:
    """The root mean square of d log p(y) / d FFN_l(x), one number an FFN.

    Args:
        decoder: one that is not differentiable is measured by noise.
        windows: int64 [N, length]; 1,000 tokens in all are enough for a number a layer.
        seed: of the draw of y.
        fast: with products of bfloat16 (`clada_export.calibration.precision`).

    Raises:
        UnsupportedModelError: logits or a price that is not finite; names the layer.
    """
    parts: list[Tensor] = []
    for done, window in enumerate(windows):
        parts.append(window_sensitivity(decoder, window, done, seed, fast))
        progress(done + 1, len(windows))
    return summed_sensitivity(decoder, parts, sum(len(window) for window in windows))


def window_sensitivity(decoder: Decoder, window: Tensor, number: int, seed: int, fast: bool = False) -> Tensor:
    """What one window adds to the squares of the numbers, times its tokens: float64 [FFNs].

    Args:
        window: int64 [length].
        number: of the window; draws of a window depend on it, and not on windows before it.
    """
    generator = torch.Generator().manual_seed(seed + STRIDE * number)
    measure = _by_gradient if decoder.differentiable else _by_noise
    with products(fast):
        return measure(decoder, window, generator)


def summed_sensitivity(decoder: Decoder, parts: Sequence[Tensor], tokens: int) -> tuple[float, ...]:
    """The numbers of all windows from what each of them adds.

    Raises:
        UnsupportedModelError: a price that is not finite; names the layer.
    """
    total = torch.zeros(len(decoder.ffns), dtype=torch.float64)
    for part in parts:
        total += part
    return _finite(decoder, (total / max(tokens, 1)).sqrt())


def _by_gradient(decoder: Decoder, window: Tensor, generator: torch.Generator) -> Tensor:
    """From the gradient of the likelihood of drawn tokens."""
    squares = torch.zeros(len(decoder.ffns), dtype=torch.float64)

    def outer(index: int, y: Tensor) -> Tensor:
        def add(gradient: Tensor) -> None:
            squares[index] += gradient.double().square().mean(-1).sum()

        # The first FFN starts the graph: nothing before it needs a gradient, and no parameter does.
        kept = y if y.requires_grad else y.detach().requires_grad_(True)
        kept.register_hook(add)  # type: ignore[no-untyped-call]
        # A model may add to what an FFN returns in place (Falcon does), and that must not be the tensor whose gradient is read.
        return kept.clone()

    with decoder.frozen(), decoder.tap(outer=outer), torch.enable_grad(), SavedInFile(decoder.module, SAVED_LIMIT):
        logits = decoder.logits(window)
        require_finite(decoder, window, logits.detach())
        # d log p(y) / d logits is 1 at y, less p: autograd would take several copies of the logits to find it.
        p = logits.detach().float().softmax(-1)
        drawn = torch.multinomial(p, 1, generator=generator)
        gradient = p.neg_().scatter_add_(-1, drawn, torch.ones(drawn.shape))
        logits.backward(gradient.to(logits.dtype))  # type: ignore[no-untyped-call]
    return squares


def _by_noise(decoder: Decoder, window: Tensor, generator: torch.Generator) -> Tensor:
    """From KL(clean || noisy) = 1/2 T d s^2 sigma^2 (summed over T tokens, noise of variance sigma^2)."""
    squares = torch.zeros(len(decoder.ffns), dtype=torch.float64)
    sizes: dict[int, float] = {}

    def measure(index: int, y: Tensor) -> None:
        sizes[index] = float(y.double().square().mean().sqrt())

    with torch.inference_mode():
        with decoder.tap(outer=measure):
            clean = _log_p(decoder, window)
        require_finite(decoder, window, clean)
        for chosen, ffn in enumerate(decoder.ffns):
            sigma = NOISE * sizes[chosen]

            def add(index: int, y: Tensor, sigma: float = sigma) -> Tensor:
                return y + sigma * torch.randn(y.shape, generator=generator, dtype=y.dtype)

            with decoder.tap(outer=add, only=[ffn]):
                noisy = _log_p(decoder, window)
            kl = float((clean.exp() * (clean - noisy)).sum())
            if sigma > 0:
                squares[chosen] = 2.0 * max(kl, 0.0) / (ffn.hidden_size * sigma**2)
    return squares


def _finite(decoder: Decoder, prices: Tensor) -> tuple[float, ...]:
    broken = [ffn.name for ffn, price in zip(decoder.ffns, prices.tolist(), strict=True) if not math.isfinite(price)]
    if broken:
        raise UnsupportedModelError(
            f"{broken[0]}: what an error in its output costs is not finite on the calibration text; the model is broken in "
            "float32"
        )
    return tuple(prices.tolist())


def _log_p(decoder: Decoder, window: Tensor) -> Tensor:
    return decoder.logits(window).double().log_softmax(-1)
