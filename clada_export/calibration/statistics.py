"""One streaming pass over the calibration text: per-layer tables, and the statistics of the load signal.

Nothing that grows with the number of tokens is kept: a table is a sum over tokens on a fixed grid of thresholds, and the grid
comes from the first window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from clada_export.calibration.scorer import LayerScorer
from clada_export.calibration.tap import FFNTap
from clada_export.errors import UsageError
from clada_export.ffn import EagerFFN
from clada_export.load_signal import surprisal_entropy
from clada_export.plan import LoadSignal

GRID = 65
"""Thresholds a layer is measured at."""
CETT_EVERY = 4
"""Every how many thresholds the error is measured too; it costs one down projection each."""
CETT_ROWS = 24
"""Rows a window on which the error is measured."""
HIGHEST_SPARSITY = 0.97


@dataclass(frozen=True)
class LayerTable:
    """What a threshold does to one FFN, measured on the calibration text.

    `threshold`, `sparsity` [GRID] ascending; `cett` [GRID / CETT_EVERY] at `cett_threshold`: the mean over tokens of
    CETT(x) = ||sum of the dropped neurons' outputs|| / ||FFN(x)|| (arXiv 2402.03804; Sparsing Law, Eq. 3).
    """

    threshold: np.ndarray
    sparsity: np.ndarray
    cett_threshold: np.ndarray
    cett: np.ndarray

    def sparsity_at(self, threshold: float | np.ndarray) -> np.ndarray:
        """The share of neurons below a threshold."""
        return np.asarray(np.interp(threshold, self.threshold, self.sparsity))

    def cett_at(self, threshold: float) -> float:
        """The mean relative error of the FFN output at a threshold."""
        return float(np.interp(threshold, self.cett_threshold, self.cett))

    def threshold_for_cett(self, target: float) -> float:
        """The largest threshold whose error stays within `target`, by bisection."""
        low, high = 0.0, float(self.threshold[-1])
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
    """One table an FFN, and the mean and standard deviation of surprisal and entropy (nats)."""

    tables: tuple[LayerTable, ...]
    load: LoadSignal


class _Accumulator:
    """The running sums of one FFN."""

    def __init__(self) -> None:
        self.grid: Tensor | None = None
        self.below = torch.zeros(GRID, dtype=torch.float64)
        self.scores = 0
        self.cett = torch.zeros(0, dtype=torch.float64)
        self.rows = 0

    def add(self, score: Tensor, h: Tensor, w_out: Tensor) -> None:
        score, h = score.reshape(-1, score.shape[-1]), h.reshape(-1, h.shape[-1])
        if self.grid is None:
            levels = torch.linspace(0.0, HIGHEST_SPARSITY, GRID)
            ordered = score.flatten().sort().values
            places = (levels * (ordered.numel() - 1)).long()
            # A score that many neurons share (ReLU: 0) would make the grid stand still; interpolation needs it ascending.
            grid = ordered[places]
            step = torch.arange(GRID) * (grid[-1].clamp(min=1e-30) * 1e-6)
            self.grid = torch.maximum(grid, torch.cummax(grid, 0).values) + step
            self.cett = torch.zeros(len(self.grid[::CETT_EVERY]), dtype=torch.float64)
        bins = torch.bucketize(score.flatten(), self.grid, right=True)
        # A score s is below grid[k] iff its bin (the number of grid values <= s) is at most k.
        self.below += torch.bincount(bins, minlength=GRID + 1)[:GRID].cumsum(0).double()
        self.scores += score.numel()
        rows = torch.linspace(0, len(score) - 1, min(CETT_ROWS, len(score))).long()
        score, h = score[rows], h[rows]
        cut = self.grid[::CETT_EVERY]
        dropped = torch.where(score.unsqueeze(0) < cut.view(-1, 1, 1), h.unsqueeze(0), torch.zeros(()))
        norm = (h @ w_out).norm(dim=-1)
        usable = norm > 0
        error = (dropped @ w_out).norm(dim=-1)[:, usable] / norm[usable]
        self.cett += error.double().sum(-1)
        self.rows += int(usable.sum())

    def table(self) -> LayerTable:
        assert self.grid is not None
        grid = self.grid.double().numpy()
        cett = (self.cett / max(self.rows, 1)).numpy()
        return LayerTable(grid, (self.below / self.scores).numpy(), grid[::CETT_EVERY], np.maximum.accumulate(cett))


def collect_statistics(
    model: nn.Module,
    ffns: Sequence[EagerFFN],
    scorers: Sequence[LayerScorer],
    windows: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrationStatistics:
    """Run the dense model over the windows once.

    Args:
        windows: int64 [N, context].
        progress: called with (windows done, windows in all).

    Raises:
        UsageError: an activation is NaN or infinite; names the layer.
    """
    sums = [_Accumulator() for _ in ffns]
    w_outs = [ffn.w_out() for ffn in ffns]
    moments = torch.zeros(5, dtype=torch.float64)

    def inner(index: int, x: Tensor, h: Tensor) -> None:
        if not bool(torch.isfinite(h).all()):
            raise UsageError(
                f"{ffns[index].name}: the activations are not finite on the calibration text; the model is broken in float32"
            )
        sums[index].add(scorers[index](x, h), h, w_outs[index])

    with torch.inference_mode(), FFNTap(ffns, inner=inner):
        for done, window in enumerate(windows):
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            surprisal, entropy = surprisal_entropy(logits, window[1:])
            s, e = surprisal.double(), entropy.double()
            moments += torch.stack((torch.tensor(float(len(s))).double(), s.sum(), s.square().sum(), e.sum(), e.square().sum()))
            progress(done + 1, len(windows))
    count, s1, s2, e1, e2 = moments.tolist()

    def deviation(first: float, second: float) -> float:
        return max(math.sqrt(max(second / count - (first / count) ** 2, 0.0)), 1e-6)

    load = LoadSignal(s1 / count, deviation(s1, s2), e1 / count, deviation(e1, e2), 0.0, 0.0)
    return CalibrationStatistics(tuple(item.table() for item in sums), load)
