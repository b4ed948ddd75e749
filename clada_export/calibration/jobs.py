"""The jobs over the calibration text: what an error in each FFN costs, and the tables of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clada_export.calibration.heldout import HeldOut
from clada_export.calibration.selector import Selectors
from clada_export.calibration.sensitivity import summed_sensitivity, window_sensitivity
from clada_export.calibration.statistics import (
    CalibrationStatistics,
    Grids,
    StatisticsPart,
    summed_statistics,
    window_statistics,
)
from clada_export.calibration.windows import Desk, Runner
from clada_export.plan.method import Method

Done = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


@dataclass(frozen=True)
class SensitivityJob:
    """What the first `length` tokens of a calibration window add to the sensitivity, float64 [FFNs]."""

    length: int
    seed: int
    fast: bool = False

    def open(self, desk: Desk) -> Callable[[int], Tensor]:
        """See `Job.open`."""

        def measure(window: int) -> Tensor:
            tokens = desk.calibration[window, : self.length]
            return window_sensitivity(desk.decoder, tokens, window, self.seed, self.fast)

        return measure


@dataclass(frozen=True)
class StatisticsJob:
    """What a calibration window adds to the tables of some methods, for the weights as they are.

    `grids` are those of the first window, which is asked for without.
    """

    methods: tuple[Method, ...]
    grids: Grids | None
    fast: bool = False

    def open(self, desk: Desk) -> Callable[[int], StatisticsPart]:
        """See `Job.open`."""
        selectors = Selectors(desk.decoder.ffns, self.methods, HeldOut.at(desk).shelf())

        def measure(window: int) -> StatisticsPart:
            with torch.inference_mode(), desk.view.on():
                return window_statistics(desk.decoder, selectors, desk.calibration[window], desk.prompt, self.grids, self.fast)

        return measure


def run_sensitivity(
    runner: Runner, count: int, length: int, *, seed: int = 0, fast: bool = False, progress: Done = lambda done, total: None
) -> tuple[float, ...]:
    """`layer_sensitivity` on the first tokens of the first calibration windows, wherever they run.

    Args:
        count: of the windows.
        length: how many tokens of each.

    Raises:
        UnsupportedModelError: as `layer_sensitivity`.
    """
    parts: list[Tensor] = []
    for part in runner.run(SensitivityJob(length, seed, fast), range(count)):
        parts.append(part)
        progress(len(parts), count)
    return summed_sensitivity(runner.desk.decoder, parts, count * length)


def run_statistics(
    runner: Runner, methods: Sequence[Method], *, fast: bool = False, progress: Done = lambda done, total: None
) -> CalibrationStatistics:
    """`collect_statistics` on the calibration windows, wherever they run; the first makes the grids for all others.

    Raises:
        UsageError: as `collect_statistics`.
    """
    count = len(runner.desk.calibration)
    (first,) = runner.run(StatisticsJob(tuple(methods), None, fast), [0])
    progress(1, count)
    parts = [first]
    for part in runner.run(StatisticsJob(tuple(methods), first.grids, fast), range(1, count)):
        parts.append(part)
        progress(len(parts), count)
    return summed_statistics(parts)
