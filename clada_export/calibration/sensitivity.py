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
from collections.abc import Callable

import torch
from torch import Tensor

from clada_export.calibration.soundness import require_finite
from clada_export.decoder.decoder import Decoder
from clada_export.errors import UnsupportedModelError

NOISE = 0.03
"""Of the root mean square of an FFN's output: small enough for the second order to hold, and far above rounding."""


def layer_sensitivity(
    decoder: Decoder,
    windows: Tensor,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, ...]:
    """The root mean square of d log p(y) / d FFN_l(x), one number an FFN.

    Args:
        decoder: one that is not differentiable is measured by noise.
        windows: int64 [N, length]; 1,000 tokens in all are enough for a number a layer.
        seed: of the draw of y.

    Raises:
        UnsupportedModelError: logits or a price that is not finite; names the layer.
    """
    measure = _by_gradient if decoder.differentiable else _by_noise
    return _finite(decoder, measure(decoder, windows, seed, progress))


def _by_gradient(decoder: Decoder, windows: Tensor, seed: int, progress: Callable[[int, int], None]) -> Tensor:
    """The numbers, float64 [FFNs], from the gradient of the likelihood of drawn tokens."""
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[int, Tensor] = {}
    squares = torch.zeros(len(decoder.ffns), dtype=torch.float64)
    tokens = 0

    def outer(index: int, y: Tensor) -> Tensor:
        # The first FFN starts the graph: nothing before it needs a gradient, and no parameter does.
        kept = y if y.requires_grad else y.detach().requires_grad_(True)
        if not kept.is_leaf:
            kept.retain_grad()
        outputs[index] = kept
        # A model may add to what an FFN returns in place (Falcon does), and that must not be the tensor whose gradient is read.
        return kept.clone()

    with decoder.frozen(), decoder.tap(outer=outer), torch.enable_grad():
        for done, window in enumerate(windows):
            logits = decoder.logits(window)
            require_finite(decoder, window, logits)
            log_p = logits.float().log_softmax(-1)
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            log_p.gather(1, drawn).sum().backward()  # type: ignore[no-untyped-call]
            for index, output in outputs.items():
                if output.grad is not None:
                    squares[index] += output.grad.double().square().mean(-1).sum()
            outputs.clear()
            tokens += len(window)
            progress(done + 1, len(windows))
    return (squares / max(tokens, 1)).sqrt()


def _by_noise(decoder: Decoder, windows: Tensor, seed: int, progress: Callable[[int, int], None]) -> Tensor:
    """The same numbers from KL(clean || noisy) = 1/2 T d s^2 sigma^2 (summed over T tokens, noise of variance sigma^2)."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.zeros(len(decoder.ffns), dtype=torch.float64)
    done, total = 0, len(windows) * len(decoder.ffns)
    with torch.inference_mode():
        for window in windows:
            sizes: dict[int, float] = {}

            def measure(index: int, y: Tensor, sizes: dict[int, float] = sizes) -> None:
                sizes[index] = float(y.double().square().mean().sqrt())

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
                    squares[chosen] += 2.0 * max(kl, 0.0) / (len(window) * ffn.hidden_size * sigma**2)
                done += 1
                progress(done, total)
    return (squares / max(len(windows), 1)).sqrt()


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
