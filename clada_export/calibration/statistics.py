"""One streaming pass over the calibration text: per-layer tables, and the statistics of the load signal.

Nothing that grows with the number of tokens is kept: a table is a sum over tokens on a fixed grid of thresholds, and the grid
comes from the first window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clada_export.calibration.precision import products
from clada_export.calibration.selector import LayerSelector, Selection, Selectors, decide
from clada_export.calibration.soundness import bounded
from clada_export.calibration.teacher import chunks
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
VALUES, FEWEST_ROWS = 2**18, 48
"""About how many scores of a window are counted, and of how many rows at least: of more, every n-th row."""
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
        """The highest level whose error stays within `target`."""
        after = int(np.searchsorted(self.cett, target, side="right"))
        if after == 0:
            return 0.0
        if after == len(self.cett):
            return float(self.level[-1])
        share = (target - self.cett[after - 1]) / (self.cett[after] - self.cett[after - 1])
        return float(self.coarse_level[after - 1] + share * (self.coarse_level[after] - self.coarse_level[after - 1]))


@dataclass(frozen=True)
class CalibrationStatistics:
    """For each method one table an FFN; the mean and standard deviation of surprisal and entropy (nats)."""

    tables: tuple[tuple[LayerTable, ...], ...]
    load: LoadSignal


@dataclass(frozen=True)
class LayerSums:
    """Sums over some rows of one FFN under one method, float64.

    Of values: those `below` each level [GRID], and their `count`. Of `rows`: `cett` and `error` [GRID / CETT_EVERY].
    """

    below: Tensor
    count: int
    cett: Tensor
    error: Tensor
    rows: int

    def plus(self, other: LayerSums) -> LayerSums:
        """Of the rows of both."""
        return LayerSums(
            self.below + other.below,
            self.count + other.count,
            self.cett + other.cett,
            self.error + other.error,
            self.rows + other.rows,
        )

    def table(self, grid: Tensor) -> LayerTable:
        """The means, at the levels of the grid."""
        levels, rows = grid.double().numpy(), max(self.rows, 1)
        cett, error = (np.maximum.accumulate((total / rows).numpy()) for total in (self.cett, self.error))
        return LayerTable(levels, (self.below / self.count).numpy(), levels[::CETT_EVERY], cett, error)


Grids = tuple[tuple[Tensor, ...], ...]
"""For each method one grid of levels [GRID] an FFN."""


@dataclass(frozen=True)
class StatisticsPart:
    """What one window adds, for each method and FFN; and of its surprisals and entropies the count, sums and sums of squares,
    float64 [5]. `grids` are those that were given, or those that the window makes."""

    grids: Grids
    sums: tuple[tuple[LayerSums, ...], ...]
    moments: Tensor


def window_statistics(
    decoder: Decoder, selectors: Selectors, window: Tensor, prompt: int, grids: Grids | None, fast: bool = False
) -> StatisticsPart:
    """Run the dense decoder over one window, for all methods.

    Args:
        window: int64 [context].
        grids: None for the first window, which makes them.
        fast: with products of bfloat16 (`clada_export.calibration.precision`).

    Raises:
        UsageError: as `collect_statistics`.
    """
    ffns = selectors.ffns
    sums: list[list[LayerSums]] = [[] for _ in selectors.layers]
    made: list[list[Tensor]] = [[] for _ in selectors.layers]

    def inner(index: int, x: Tensor, h: Tensor) -> None:
        if not bool(torch.isfinite(h).all()):
            raise UsageError(
                f"{ffns[index].name}: the activations are not finite on the calibration text; the model is broken in float32"
            )
        x, h = x.reshape(-1, x.shape[-1]), h.reshape(-1, h.shape[-1])
        known: dict[int, Tensor] = {}
        sample = _Sample.of(h[prompt:], ffns[index].w_out())
        for place, layers in enumerate(selectors.layers):
            selection = decide(layers[index], x, h, prompt, known)
            # -inf marks a granule that may not run.
            if bool((selection.values.isnan() | (selection.values == float("inf"))).any()):
                raise UsageError(
                    f"{ffns[index].name}: a score is not finite on the calibration text; the router or the weights are broken"
                )
            grid = _make_grid(layers[index], selection.values) if grids is None else grids[place][index]
            made[place].append(grid)
            sums[place].append(_layer_sums(layers[index], selection, sample, grid))

    with products(fast), decoder.tap(inner=inner, only=ffns):
        logits = decoder.logits(window)[:-1]
        parts = [torch.stack(surprisal_entropy(logits[part], window[1:][part])) for part in chunks(logits)]
    s, e = bounded(torch.cat(parts, dim=1).double())
    moments = torch.stack((torch.tensor(float(len(s))).double(), s.sum(), s.square().sum(), e.sum(), e.square().sum()))
    return StatisticsPart(tuple(map(tuple, made)), tuple(map(tuple, sums)), moments)


@dataclass(frozen=True)
class _Sample:
    """The rows of a window on which the error is measured: `places` in h, their h [n, f], the norm of their output [n]."""

    places: Tensor
    h: Tensor
    w_out: Tensor
    norm: Tensor

    @classmethod
    def of(cls, h: Tensor, w_out: Tensor) -> _Sample:
        places = torch.linspace(0, len(h) - 1, min(CETT_ROWS, len(h))).long()
        # In float64: squares of what is large in float32 are infinite.
        return cls(places, h[places], w_out, (h[places] @ w_out).double().norm(dim=-1))


def _layer_sums(selector: LayerSelector, selection: Selection, sample: _Sample, grid: Tensor) -> LayerSums:
    values = _some_rows(selection.values)
    bins = torch.bucketize(values.flatten(), grid, right=True)
    # A value v is below grid[k] iff its bin (the number of grid values <= v) is at most k.
    below = torch.bincount(bins, minlength=GRID + 1)[:GRID].cumsum(0).double()
    chosen = Selection(
        selection.values if len(selection.values) == 1 else selection.values[sample.places],
        selection.scores if selection.scores is None or len(selection.scores) == 1 else selection.scores[sample.places],
    )
    remaining = torch.stack([selector.hidden(sample.h, chosen, float(level))[0] for level in grid[::CETT_EVERY]])
    usable = sample.norm > 0
    error = ((sample.h - remaining) @ sample.w_out).double().norm(dim=-1)[:, usable]
    cett = (error / sample.norm[usable]).clamp(max=HIGHEST_CETT).sum(-1)
    return LayerSums(below, values.numel(), cett, error.square().sum(-1), int(usable.sum()))


def _make_grid(selector: LayerSelector, values: Tensor) -> Tensor:
    levels = torch.linspace(0.0, HIGHEST_SPARSITY, GRID)
    ordered = _some_rows(values).flatten().sort().values.clamp(min=0.0, max=selector.axis.highest)
    grid = ordered[(levels * (ordered.numel() - 1)).long()].clamp(max=HIGHEST_LEVEL)
    # A value that many granules share (ReLU: 0) would make the grid stand still; interpolation needs it ascending.
    step = torch.arange(GRID) * (grid[-1].clamp(min=1e-30) * 1e-6)
    return torch.cummax(grid, 0).values + step


def _some_rows(values: Tensor) -> Tensor:
    """Every n-th row, so that they are about `VALUES` values or fewer, but no fewer rows than `FEWEST_ROWS`."""
    step = min(math.ceil(values.numel() / VALUES), len(values) // FEWEST_ROWS)
    return values[:: max(1, step)]


def collect_statistics(
    decoder: Decoder,
    selectors: Selectors,
    windows: Tensor,
    prompt: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    fast: bool = False,
) -> CalibrationStatistics:
    """Run the dense decoder over the windows once, for all methods.

    Args:
        selectors: of the decoder's FFNs.
        windows: int64 [N, context].
        prompt: tokens of every window that are its prompt: they give the prompt statistic, and are not measured.
        progress: called with (windows done, windows in all).
        fast: with products of bfloat16 (`clada_export.calibration.precision`).

    Raises:
        UsageError: an activation or a score is NaN or infinite; names the layer.
    """
    parts: list[StatisticsPart] = []
    with torch.inference_mode():
        for done, window in enumerate(windows):
            parts.append(window_statistics(decoder, selectors, window, prompt, parts[0].grids if parts else None, fast))
            progress(done + 1, len(windows))
    return summed_statistics(parts)


def summed_statistics(parts: Iterable[StatisticsPart]) -> CalibrationStatistics:
    """The tables of all windows from what each of them adds, summed up in their order."""
    first, *rest = parts
    sums, moments = [list(layers) for layers in first.sums], first.moments
    for part in rest:
        moments = moments + part.moments
        for mine, others in zip(sums, part.sums, strict=True):
            mine[:] = [one.plus(other) for one, other in zip(mine, others, strict=True)]
    count, s1, s2, e1, e2 = moments.tolist()

    def deviation(total: float, squares: float) -> float:
        return max(math.sqrt(max(squares / count - (total / count) ** 2, 0.0)), 1e-6)

    load = LoadSignal(s1 / count, deviation(s1, s2), e1 / count, deviation(e1, e2), 0.0, 0.0)
    tables = (
        tuple(item.table(grid) for item, grid in zip(layers, grids, strict=True))
        for layers, grids in zip(sums, first.grids, strict=True)
    )
    return CalibrationStatistics(tuple(tables), load)
