"""How far a sparse model drifts from the dense one on held-out text, simulated with masks in eager PyTorch."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clada_export.calibration.selector import LayerSelector, decide
from clada_export.calibration.soundness import bounded, perplexity, require_finite, require_perplexity, rise
from clada_export.decoder.decoder import Decoder
from clada_export.decoder.tap import FFNTap
from clada_export.load.surprisal import surprisal_entropy

KEEP_LIMIT = 640 * 2**20
"""Bytes of dense logits that are kept in memory between measurements; beyond it they are in a temporary file."""


@dataclass(frozen=True)
class Drift:
    """Sparse against dense, per token: arrays [tokens] of nll (nats), dense nll, KL(dense || sparse) and top-1 agreement.

    `window` [tokens] is the window of each token; `sparsity` the share of skipped neurons.
    """

    nll: np.ndarray
    dense_nll: np.ndarray
    kl: np.ndarray
    top1: np.ndarray
    window: np.ndarray
    sparsity: float

    @property
    def ppl_increase(self) -> float:
        """Relative rise of perplexity: exp(mean nll - mean dense nll) - 1."""
        return rise(float((self.nll - self.dense_nll).mean()))

    @property
    def ppl_increase_bound(self) -> float:
        """The same, one standard error (over tokens, paired) higher."""
        difference = self.nll - self.dense_nll
        error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
        return rise(float(difference.mean()) + error)

    @property
    def mean_kl(self) -> float:
        """Mean KL(dense || sparse), nats a token."""
        return float(self.kl.mean())

    @property
    def kl_bound(self) -> float:
        """Mean KL plus one standard error over tokens."""
        return self.mean_kl + (float(self.kl.std(ddof=1)) / math.sqrt(len(self.kl)) if len(self.kl) > 1 else 0.0)

    def window_kl(self) -> np.ndarray:
        """Mean KL of every window."""
        return np.array([self.kl[self.window == index].mean() for index in np.unique(self.window)])

    def gain_over(self, other: Drift) -> tuple[float, float]:
        """How much lower the mean KL is than that of `other`, window by window, and the standard error of it (nats a token).

        The error is infinite for a single window.
        """
        gain = other.window_kl() - self.window_kl()
        return float(gain.mean()), float(gain.std(ddof=1)) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf

    def summary(self) -> dict[str, float]:
        """Numbers for a report."""
        return {
            "tokens": float(len(self.nll)),
            "dense_ppl": perplexity(float(self.dense_nll.mean())),
            "ppl": perplexity(float(self.nll.mean())),
            "ppl_increase": self.ppl_increase,
            "ppl_increase_bound": self.ppl_increase_bound,
            "kl": self.mean_kl,
            "kl_bound": self.kl_bound,
            "top1": float(self.top1.mean()),
            "sparsity": self.sparsity,
        }


class Meter(Protocol):
    """Runs windows with the FFNs changed after the prompt, and compares with the dense model."""

    prompt: int

    def through(self, tap: Callable[[int], FFNTap], step: Callable[[], None] = lambda: None) -> Drift:
        """See `DriftMeter.through`."""
        ...


class DriftMeter:
    """Measures methods on held-out windows as an engine runs them: the prompt dense, every later token sparse.

    The dense side is computed once, from the model as it is then. Drift is that of the sparse tokens' predictions.

    Args:
        windows: int64 [N, context].
        prompt: tokens of every window that run dense, at least 1.

    Raises:
        UnsupportedModelError: logits that are not finite, or a text so unlikely that it has no perplexity.
    """

    def __init__(self, decoder: Decoder, windows: Tensor, prompt: int = 1) -> None:
        self._decoder, self._windows = decoder, windows
        self.prompt = prompt
        self._dense: list[Tensor] = []
        signals: list[Tensor] = []
        with torch.inference_mode():
            for window in windows:
                logits = self._logits(window)
                require_finite(decoder, window, logits)
                self._dense.append(hold(logits[prompt:], logits[prompt:].nbytes * len(windows)))
                signals.append(bounded(torch.stack(surprisal_entropy(logits[:-1], window[1:]))))
        self.signals = torch.stack(signals)
        """Surprisal and entropy of every token but the first of each window, float32 [N, 2, context - 1]."""
        require_perplexity(float(self.signals[:, 0].double().mean()))

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return int(self._windows.shape[1])

    def _logits(self, window: Tensor) -> Tensor:
        return self._decoder.logits(window).float()

    def measure(
        self,
        layers: Sequence[LayerSelector],
        levels: np.ndarray,
        multiplier: Tensor | None = None,
        step: Callable[[], None] = lambda: None,
    ) -> Drift:
        """Run the sparse model.

        Args:
            layers: one selector an FFN.
            levels: [layers].
            multiplier: m(load), float32 [N, context], or None for 1. Token t of a window runs under the load of the step
                before it: the surprisal of token t and the entropy of the distribution that it came from.
            step: called after every window.
        """
        active = total = 0
        prompt = self.prompt

        def inner(current: int, index: int, x: Tensor, h: Tensor) -> Tensor:
            nonlocal active, total
            selector = layers[index]
            rows = h.reshape(-1, h.shape[-1])
            selection = decide(selector, x.reshape(-1, x.shape[-1]), rows, prompt)
            level: Tensor | float = float(levels[index])
            if multiplier is not None:
                level = selector.axis.moved(torch.tensor(level), multiplier[current, prompt:].unsqueeze(-1))
            remaining, keep = selector.hidden(rows[prompt:], selection, level)
            decided = len(rows) - prompt
            width = selector.layer.granule
            active += int(keep.sum()) * width * (decided if len(keep) == 1 else 1)
            total += selector.layer.width * decided
            return torch.cat((rows[:prompt], remaining)).reshape(h.shape)

        drift = self.through(lambda current: self._decoder.tap(inner=partial(inner, current)), step)
        return replace(drift, sparsity=1.0 - active / total)

    def through(self, tap: Callable[[int], FFNTap], step: Callable[[], None] = lambda: None) -> Drift:
        """Run the model with taps that make it sparse after the prompt; the drift's sparsity is not known here, and 0.

        Args:
            tap: makes the tap of a window, from its number.
            step: called after every window.
        """
        parts: list[Tensor] = []
        with torch.inference_mode():
            for current, window in enumerate(self._windows):
                dense = self._dense[current]
                with tap(current):
                    sparse = self._logits(window)[self.prompt :]
                parts.append(compare(dense[:-1], sparse[:-1], window[self.prompt + 1 :], current))
                step()
        return drift_of(parts, 0.0)


def hold(values: Tensor, size: int) -> Tensor:
    """A copy of the values, in memory if it and its like take no more than `KEEP_LIMIT`, else in a file that goes with it.

    Args:
        values: float32.
        size: bytes of all that is held.
    """
    if size <= KEEP_LIMIT:
        return values.clone()
    with tempfile.TemporaryFile() as stream:
        mapped = np.memmap(stream, dtype=np.float32, mode="w+", shape=tuple(values.shape))
    mapped[:] = values.numpy()
    return torch.from_numpy(mapped)


def drift_of(parts: Sequence[Tensor], sparsity: float) -> Drift:
    """The drift of rows that `compare` gave."""
    nll, dense_nll, kl, top1, place = torch.cat(tuple(parts), dim=1).double().numpy()
    return Drift(nll, dense_nll, kl, top1, place, sparsity)


def compare(dense: Tensor, sparse: Tensor, targets: Tensor, window: int) -> Tensor:
    """What `Drift` holds of some tokens, float32 [5, rows]: nll, dense nll, KL(dense || sparse), top-1 agreement, window.

    Args:
        dense, sparse: logits, float32 [rows, vocabulary].
        targets: the tokens that followed, int64 [rows].
    """
    dense_log, sparse_log = dense.log_softmax(-1), sparse.log_softmax(-1)
    place = targets.unsqueeze(-1)
    return torch.stack(
        (
            bounded(-sparse_log.gather(-1, place).squeeze(-1)),
            bounded(-dense_log.gather(-1, place).squeeze(-1)),
            bounded((dense_log.exp() * (dense_log - sparse_log)).sum(-1).clamp(min=0.0)),
            (dense.argmax(-1) == sparse.argmax(-1)).float(),
            torch.full((len(targets),), float(window)),
        )
    )
