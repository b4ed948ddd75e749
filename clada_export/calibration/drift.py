"""How far a sparse model drifts from the dense one on held-out text, simulated with masks in eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clada_export.calibration.cache import CalibrationCache, what_selects
from clada_export.calibration.heldout import HeldOut, groups_of
from clada_export.calibration.selector import MethodSelectors
from clada_export.calibration.soundness import perplexity, require_perplexity, rise
from clada_export.calibration.teacher import Teacher
from clada_export.calibration.windows import Desk, InProcess, Runner
from clada_export.decoder.decoder import Decoder
from clada_export.decoder.tap import FFNTap
from clada_export.plan.method import Method
from clada_export.plan.tensors import arrays_digest


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

    def upto(self, other: Drift) -> Drift:
        """The part of it that is of the windows of another, which was measured on the first of them only."""
        part = slice(len(other.nll))
        return Drift(self.nll[part], self.dense_nll[part], self.kl[part], self.top1[part], self.window[part], self.sparsity)

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


@dataclass(frozen=True)
class DensePart:
    """Surprisal and entropy of every token but the first of a group's windows, float32 [windows, 2, context - 1]."""

    signals: Tensor


@dataclass(frozen=True)
class DenseJob:
    """The dense side of a group of held-out windows (`HeldOut.groups`)."""

    fast: bool

    def open(self, desk: Desk) -> Callable[[int], DensePart]:
        """See `Job.open`."""
        heldout = HeldOut.at(desk)

        def run(group: int) -> DensePart:
            with torch.inference_mode():
                return DensePart(heldout.signals(group, self.fast))

        return run


@dataclass(frozen=True)
class DriftPart:
    """Of a group: what `compare` gives, float32 [5, rows]; the neurons that ran, and all."""

    rows: Tensor
    active: int
    total: int


@dataclass(frozen=True)
class DriftJob:
    """The drift of a method on a group of held-out windows, by `DriftMeter.measure`."""

    method: Method
    levels: np.ndarray
    multiplier: Tensor | None
    fast: bool

    def open(self, desk: Desk) -> Callable[[int], DriftPart]:
        """See `Job.open`."""
        heldout = HeldOut.at(desk)

        def run(group: int) -> DriftPart:
            with torch.inference_mode():
                layers = heldout.selectors(self.method)
                return DriftPart(*heldout.sparse(group, layers, self.levels, self.multiplier, self.fast))

        return run


class DriftMeter:
    """Measures methods on held-out windows as an engine runs them: the prompt dense, every later token sparse.

    The dense side is computed once, from the model as it is given. Drift is that of the sparse tokens' predictions.

    Args:
        windows: int64 [N, context].
        prompt: tokens of every window that run dense, at least 1.
        fast: measure with products of bfloat16 (`clada_export.calibration.precision`), on both sides, where nobody asks for an
            exact measurement.
        cache: keeps what was measured; for the weights as they are. Whoever changes them changes it.
        runner: runs the windows; by default this process.
        progress: called for every window of the dense side.

    Raises:
        UnsupportedModelError: logits that are not finite, or a text so unlikely that it has no perplexity.
    """

    def __init__(
        self,
        decoder: Decoder,
        windows: Tensor,
        prompt: int = 1,
        *,
        fast: bool = False,
        cache: CalibrationCache | None = None,
        runner: Runner | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.prompt, self.fast = prompt, fast
        self.cache = cache or CalibrationCache()
        self._runner = runner or InProcess(Desk(decoder, windows, windows, prompt))
        self._windows = windows
        self._groups = groups_of(windows, prompt, decoder, self._runner.desk.at_once)
        # Where a measurement may end early does not depend on how many windows the runner takes at once.
        self._ends = {group[-1] for group in groups_of(windows, prompt, decoder)}
        self._text = {"windows": arrays_digest({"windows": windows.numpy()}), "prompt": prompt, "groups": len(self._groups)}
        self.signals = self._signals(progress)
        """Surprisal and entropy of every token but the first of each window, float32 [N, 2, context - 1]."""
        require_perplexity(float(self.signals[:, 0].double().mean()))

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return int(self._windows.shape[1])

    def measure(
        self,
        layers: MethodSelectors,
        levels: np.ndarray,
        multiplier: Tensor | None = None,
        step: Callable[[], None] = lambda: None,
        *,
        exact: bool = False,
        enough: Callable[[Drift], bool] = lambda drift: False,
    ) -> Drift:
        """Run the sparse model.

        Args:
            layers: one selector an FFN.
            levels: [layers].
            multiplier: m(load), float32 [N, context], or None for 1. Token t of a window runs under the load of the step
                before it: the surprisal of token t and the entropy of the distribution that it came from.
            step: called after every window.
            exact: with float32 products, whatever this meter does else.
            enough: asked with the drift of the windows so far whether they are enough.
        """
        fast = self.fast and not exact
        job = DriftJob(layers.method, np.asarray(levels, dtype=np.float64), multiplier, fast)
        key = {
            **self._text,
            "method": what_selects(layers.method),
            "levels": job.levels.tolist(),
            "multiplier": None if multiplier is None else arrays_digest({"m": multiplier.numpy()}),
            "fast": fast,
        }
        rows = len(self._windows) * (self.context - self.prompt - 1)
        kept = self.cache.arrays("drift", key, {"rows": (5, rows), "sparsity": (1,)})
        if kept is not None:
            for _ in self._windows:
                step()
            return drift_of([torch.from_numpy(kept["rows"])], float(kept["sparsity"][0]))
        parts: list[Tensor] = []
        active = total = 0
        drift: Drift | None = None
        for group, part in zip(self._groups, self._runner.run(job, range(len(self._groups))), strict=False):
            parts.append(part.rows)
            active, total = active + part.active, total + part.total
            drift = drift_of(parts, 1.0 - active / total)
            for _ in group:
                step()
            if group[-1] in self._ends and len(parts) < len(self._groups) and enough(drift):
                return drift
        assert drift is not None
        self.cache.keep_arrays("drift", key, {"rows": torch.cat(parts, dim=1).numpy(), "sparsity": np.array([drift.sparsity])})
        return drift

    def through(self, tap: Callable[[int], FFNTap], step: Callable[[], None] = lambda: None) -> Drift:
        """Run the model with taps that make it sparse after the prompt; the drift's sparsity is not known here, and 0.

        Args:
            tap: makes the tap of a window, from its number.
            step: called after every window.
        """
        heldout = HeldOut.at(self._runner.desk)
        parts: list[Tensor] = []
        with torch.inference_mode():
            for current in range(len(self._windows)):
                parts.append(heldout.through(current, tap(current), False))
                step()
        return drift_of(parts, 0.0)

    def _signals(self, progress: Callable[[], None]) -> Tensor:
        key = {**self._text, "fast": self.fast}
        kept = self.cache.arrays("signals", key, {"signals": (len(self._windows), 2, self.context - 1)})
        if kept is not None:
            return torch.from_numpy(kept["signals"])
        signals: list[Tensor] = []
        for group, part in zip(self._groups, self._runner.run(DenseJob(self.fast), range(len(self._groups))), strict=True):
            signals.append(part.signals)
            for _ in group:
                progress()
        found = torch.cat(signals)
        self.cache.keep_arrays("signals", key, {"signals": found.numpy()})
        return found


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
    found = Teacher.of(dense, targets, 0).compare(sparse, targets)
    return torch.cat((found, torch.full((1, len(targets)), float(window))))
