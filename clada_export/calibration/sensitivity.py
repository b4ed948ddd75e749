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
from torch import Tensor, nn

from clada_export.calibration.soundness import require_finite
from clada_export.decoder.ffn import EagerFFN
from clada_export.decoder.tap import FFNTap
from clada_export.errors import UnsupportedModelError

NOISE = 0.03
"""Of the root mean square of an FFN's output: small enough for the second order to hold, and far above rounding."""


def layer_sensitivity(
    model: nn.Module,
    ffns: Sequence[EagerFFN],
    windows: Tensor,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, ...]:
    """The root mean square of d log p(y) / d FFN_l(x), one number an FFN.

    Args:
        model: one whose `differentiable` is False is measured by noise.
        windows: int64 [N, length]; 1,000 tokens in all are enough for a number a layer.
        seed: of the draw of y.

    Raises:
        UnsupportedModelError: logits or a price that is not finite; names the layer.
    """
    if not getattr(model, "differentiable", True):
        return _by_noise(model, ffns, windows, seed, progress)
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[int, Tensor] = {}
    squares = torch.zeros(len(ffns), dtype=torch.float64)
    tokens = 0

    def outer(index: int, y: Tensor) -> Tensor:
        # The first FFN starts the graph: nothing before it needs a gradient, and no parameter does.
        kept = y if y.requires_grad else y.detach().requires_grad_(True)
        if not kept.is_leaf:
            kept.retain_grad()
        outputs[index] = kept
        # A model may add to what an FFN returns in place (Falcon does), and that must not be the tensor whose gradient is read.
        return kept.clone()

    wanted = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        with FFNTap(ffns, outer=outer), torch.enable_grad():
            for done, window in enumerate(windows):
                logits = model(input_ids=window[None], use_cache=False).logits[0]
                require_finite(model, ffns, window, logits)
                log_p = logits.float().log_softmax(-1)
                drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
                log_p.gather(1, drawn).sum().backward()
                for index, output in outputs.items():
                    if output.grad is not None:
                        squares[index] += output.grad.double().square().mean(-1).sum()
                outputs.clear()
                tokens += len(window)
                progress(done + 1, len(windows))
    finally:
        for parameter, flag in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)
    return _finite(ffns, (squares / max(tokens, 1)).sqrt())


def _by_noise(
    model: nn.Module, ffns: Sequence[EagerFFN], windows: Tensor, seed: int, progress: Callable[[int, int], None]
) -> tuple[float, ...]:
    """The same numbers from KL(clean || noisy) = 1/2 T d s^2 sigma^2 (summed over T tokens, noise of variance sigma^2)."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.zeros(len(ffns), dtype=torch.float64)
    done, total = 0, len(windows) * len(ffns)
    with torch.inference_mode():
        for window in windows:
            sizes: dict[int, float] = {}

            def measure(index: int, y: Tensor, sizes: dict[int, float] = sizes) -> None:
                sizes[index] = float(y.double().square().mean().sqrt())

            with FFNTap(ffns, outer=measure):
                clean = _log_p(model, window)
            require_finite(model, ffns, window, clean)
            for chosen, ffn in enumerate(ffns):
                sigma = NOISE * sizes[chosen]

                def add(index: int, y: Tensor, sigma: float = sigma) -> Tensor:
                    return y + sigma * torch.randn(y.shape, generator=generator, dtype=y.dtype)

                with FFNTap([ffn], outer=add):
                    noisy = _log_p(model, window)
                kl = float((clean.exp() * (clean - noisy)).sum())
                if sigma > 0:
                    squares[chosen] += 2.0 * max(kl, 0.0) / (len(window) * ffn.hidden_size * sigma**2)
                done += 1
                progress(done, total)
    return _finite(ffns, (squares / max(len(windows), 1)).sqrt())


def _finite(ffns: Sequence[EagerFFN], prices: Tensor) -> tuple[float, ...]:
    broken = [ffn.name for ffn, price in zip(ffns, prices.tolist(), strict=True) if not math.isfinite(price)]
    if broken:
        raise UnsupportedModelError(
            f"{broken[0]}: what an error in its output costs is not finite on the calibration text; the model is broken in "
            "float32"
        )
    return tuple(prices.tolist())


def _log_p(model: nn.Module, window: Tensor) -> Tensor:
    log_p: Tensor = model(input_ids=window[None], use_cache=False).logits[0].double().log_softmax(-1)
    return log_p
