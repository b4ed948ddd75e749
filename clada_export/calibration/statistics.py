"""One streaming pass over the calibration text: per-layer tables, and the statistics of the load signal.

Nothing that grows with the number of tokens is kept: a table is a sum over tokens on a fixed grid of thresholds, and the grid
comes from the first window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clada_export.calibration.selector import LayerSelector, Selection, Selectors, decide
from clada_export.calibration.soundness import bounded
from clada_export.decoder.decoder import Decoder
from clada_export.errors import UsageError
from clada_export.load.signal import LoadSignal
from clada_export.load.surprisal import surprisal_entropy

GRID = 65
"""Levels a layer is measured at."""
CETT_EVERY = 4
"""Every how many levels the error is measured too; it costs one down projection each."""
CETT_ROWS = 24
"""Rows a window on which the error is measured."""
HIGHEST_SPARSITY = 0.97
HIGHEST_CETT = 1e6
"""Of one row, whose neurons may all but cancel out."""
HIGHEST_LEVEL = 1e37
"""So that the threshold, and what the load makes of it, is a float32."""


@dataclass(frozen=True)
class LayerTable:
    """What a level (`axis`) does to one FFN, measured on the calibration text.

    `level`, `sparsity` [GRID] ascending. At `coarse_level` [GRID / CETT_EVERY]: `cett`, the mean over tokens of
    CETT(x) = ||FFN(x) - sparse FFN(x)|| / ||FFN(x)|| (arXiv 2402.03804; Sparsing Law, Eq. 3: the norm of the sum of the dropped
    neurons' outputs), and `error`, the mean of ||FFN(x) - sparse FFN(x)||^2.
    """

    level: np.ndarray
    sparsity: np.ndarray
    coarse_level: np.ndarray
    cett: np.ndarray
    error: np.ndarray

    def sparsity_at(self, level: float | np.ndarray) -> np.ndarray:
        """The share of neurons below a level."""
        return np.asarray(np.interp(level, self.level, self.sparsity))

    def level_for(self, sparsity: float) -> float:
        """The level that skips this share of the neurons."""
        return float(np.interp(sparsity, self.sparsity, self.level))

    def cett_at(self, level: float) -> float:
        """The mean relative error of the FFN output at a level."""
        return float(np.interp(level, self.coarse_level, self.cett))

    def level_for_cett(self, target: float) -> float:
        """The highest level whose error stays within `target`, by bisection."""
        low, high = 0.0, float(self.level[-1])
        if self.cett_at(high) <= target:
            return high
        for _ in range(50):
            middle = (low + high) / 2
            if self.cett_at(middle) <= target:
                low = middle
            else:
                high = middle
        return low


@dataclass(frozen=True)
class CalibrationStatistics:
    """For each method one table an FFN; the mean and standard deviation of surprisal and entropy (nats)."""

    tables: tuple[tuple[LayerTable, ...], ...]
    load: LoadSignal


class _Accumulator:
    """The running sums of one FFN under one method."""

    def __init__(self, selector: LayerSelector) -> None:
        self.selector = selector
        self.grid: Tensor | None = None
        self.below = torch.zeros(GRID, dtype=torch.float64)
        self.count = 0
        self.cett = torch.zeros(len(range(0, GRID, CETT_EVERY)), dtype=torch.float64)
        self.error = torch.zeros_like(self.cett)
        self.rows = 0

    def add(self, selection: Selection, h: Tensor, w_out: Tensor) -> None:
        values = selection.values
        if self.grid is None:
            self.grid = self._make_grid(values)
        bins = torch.bucketize(values.flatten(), self.grid, right=True)
        # A value v is below grid[k] iff its bin (the number of grid values <= v) is at most k.
        self.below += torch.bincount(bins, minlength=GRID + 1)[:GRID].cumsum(0).double()
        self.count += values.numel()
        rows = torch.linspace(0, len(h) - 1, min(CETT_ROWS, len(h))).long()
        chosen = Selection(
            values if len(values) == 1 else values[rows],
            selection.scores if selection.scores is None or len(selection.scores) == 1 else selection.scores[rows],
        )
        h = h[rows]
        remaining = torch.stack([self.selector.hidden(h, chosen, float(level))[0] for level in self.grid[::CETT_EVERY]])
        # In float64: squares of what is large in float32 are infinite.
        norm = (h @ w_out).double().norm(dim=-1)
        usable = norm > 0
        error = ((h - remaining) @ w_out).double().norm(dim=-1)[:, usable]
        self.cett += (error / norm[usable]).clamp(max=HIGHEST_CETT).sum(-1)
        self.error += error.square().sum(-1)
        self.rows += int(usable.sum())

    def _make_grid(self, values: Tensor) -> Tensor:
        levels = torch.linspace(0.0, HIGHEST_SPARSITY, GRID)
        ordered = values.flatten().sort().values.clamp(min=0.0, max=self.selector.axis.highest)
        grid = ordered[(levels * (ordered.numel() - 1)).long()].clamp(max=HIGHEST_LEVEL)
        # A value that many granules share (ReLU: 0) would make the grid stand still; interpolation needs it ascending.
        step = torch.arange(GRID) * (grid[-1].clamp(min=1e-30) * 1e-6)
        return torch.cummax(grid, 0).values + step

    def table(self) -> LayerTable:
        assert self.grid is not None
        grid = self.grid.double().numpy()
        rows = max(self.rows, 1)
        cett, error = (np.maximum.accumulate((total / rows).numpy()) for total in (self.cett, self.error))
        return LayerTable(grid, (self.below / self.count).numpy(), grid[::CETT_EVERY], cett, error)


def collect_statistics(
    decoder: Decoder,
    selectors: Selectors,
    windows: Tensor,
    prompt: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrationStatistics:
    """Run the dense decoder over the windows once, for all methods.

    Args:
        selectors: of the decoder's FFNs.
        windows: int64 [N, context].
        prompt: tokens of every window that are its prompt: they give the prompt statistic, and are not measured.
        progress: called with (windows done, windows in all).

    Raises:
        UsageError: an activation or a score is NaN or infinite; names the layer.
    """
    ffns = selectors.ffns
    sums = [[_Accumulator(selector) for selector in layers] for layers in selectors.layers]
    w_outs = [ffn.w_out() for ffn in ffns]
    moments = torch.zeros(5, dtype=torch.float64)

    def inner(index: int, x: Tensor, h: Tensor) -> None:
        if not bool(torch.isfinite(h).all()):
            raise UsageError(
                f"{ffns[index].name}: the activations are not finite on the calibration text; the model is broken in float32"
            )
        x, h = x.reshape(-1, x.shape[-1]), h.reshape(-1, h.shape[-1])
        known: dict[int, Tensor] = {}
        for layers, totals in zip(selectors.layers, sums, strict=True):
            selection = decide(layers[index], x, h, prompt, known)
            # -inf marks a granule that may not run.
            if bool((selection.values.isnan() | (selection.values == float("inf"))).any()):
                raise UsageError(
                    f"{ffns[index].name}: a score is not finite on the calibration text; the router or the weights are broken"
                )
            totals[index].add(selection, h[prompt:], w_outs[index])

    with torch.inference_mode(), decoder.tap(inner=inner, only=ffns):
        for done, window in enumerate(windows):
            logits = decoder.logits(window)[:-1]
            surprisal, entropy = surprisal_entropy(logits, window[1:])
            s, e = bounded(surprisal.double()), bounded(entropy.double())
            moments += torch.stack((torch.tensor(float(len(s))).double(), s.sum(), s.square().sum(), e.sum(), e.square().sum()))
            progress(done + 1, len(windows))
    count, s1, s2, e1, e2 = moments.tolist()

    def deviation(first: float, second: float) -> float:
        return max(math.sqrt(max(second / count - (first / count) ** 2, 0.0)), 1e-6)

    load = LoadSignal(s1 / count, deviation(s1, s2), e1 / count, deviation(e1, e2), 0.0, 0.0)
    return CalibrationStatistics(tuple(tuple(item.table() for item in layers) for layers in sums), load)
