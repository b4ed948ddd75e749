"""Where the bars of a chart stand: the arithmetic behind `bars` in `templates/pieces.html.jinja`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_QUARTERS = 4
_MOST_NUMBERS = 32
"""Bars with their index below; more would run into each other."""


@dataclass(frozen=True)
class Tick:
    """A line across the chart: its height in pixels, and what it stands for in percent."""

    y: float
    percent: float


@dataclass(frozen=True)
class Bar:
    """One bar, in pixels. `value` is a share; `numbered` bars have their index below, at `middle`."""

    name: str
    value: float
    x: float
    y: float
    width: float
    height: float
    middle: float
    numbered: bool


@dataclass(frozen=True)
class BarChart:
    """Shares by name, one bar each; all lengths in pixels.

    Attributes:
        values: shares, at least one.
        top: the value at the upper end of the axis; by default a round one that no bar goes beyond.
    """

    title: str
    names: Sequence[str]
    values: Sequence[float]
    colour: str
    top: float | None = None
    width: int = 860
    height: int = 190
    left: int = 46
    head: int = 26
    foot: int = 24

    @property
    def right(self) -> int:
        """Where the lines across end."""
        return self.width - 6

    @property
    def _plot_height(self) -> int:
        return self.height - self.foot - self.head

    def _limit(self) -> float:
        return self.top or _round_up(max(self.values))

    def ticks(self) -> Iterator[Tick]:
        """The ends of the axis and its quarters, from below."""
        for quarter in range(_QUARTERS + 1):
            y = self.head + self._plot_height * (1 - quarter / _QUARTERS)
            yield Tick(y, self._limit() * quarter * (100 // _QUARTERS))

    def bars(self) -> Iterator[Bar]:
        """The bars in order; what lies beyond the axis is cut off."""
        limit, slot = self._limit(), (self.right - self.left) / len(self.values)
        every = max(1, math.ceil(len(self.values) / _MOST_NUMBERS))
        for index, (name, value) in enumerate(zip(self.names, self.values, strict=True)):
            x, height = self.left + index * slot, self._plot_height * min(max(value / limit, 0.0), 1.0)
            y = self.head + self._plot_height - height
            yield Bar(name, value, x + slot * 0.12, y, slot * 0.76, height, x + slot / 2, index % every == 0)


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten, so that quarters of the axis read well."""
    if value < 1e-12 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if value <= step * power * (1 + 1e-9))
