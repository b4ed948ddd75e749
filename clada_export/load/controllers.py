"""How surprisal and entropy become a load: one small class for each controller, over NumPy.

A controller sees the standardised signals of a step and gives the load of the next. The op turns a load into the multiplier of
its thresholds, m = clip(exp(-load_slope * load), load_min, load_max), so a controller that wants the multiplier m returns
load = -ln(m) / slope; +inf makes the step dense, and puts its row into the prompt statistic of engines that keep one.

Controllers are pure: their state is passed in and returned, arrays whose first axis is the row; `clada_export.load.tracker`
holds it. They are our own derivations around the idea of CLADA (arXiv 2502.19078), whose equation for the threshold we could
not read; `Gate` follows what its public code does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from clada_export.load.values import LARGEST, Array

if TYPE_CHECKING:
    from torch import Tensor

LOAD_LIMIT = 4.0
"""The load of `exp` is clipped to [-LOAD_LIMIT, LOAD_LIMIT]."""

LONGEST_WINDOW = 4096

State: TypeAlias = tuple[Array, ...]
Values = TypeVar("Values", npt.NDArray[np.float64], "Tensor")
"""Arrays of the runtime, or tensors of calibration; both do the same arithmetic in their own type."""

_GRID: Array = np.linspace(-LOAD_LIMIT, LOAD_LIMIT, 65)
_NORMAL: Array = np.array([(1 + math.erf(place / math.sqrt(2))) / 2 for place in _GRID])


@dataclass(frozen=True)
class Signals:
    """What a controller sees of one step, all [B].

    `surprisal` and `entropy` are in standard deviations from their mean; `drive` is their weighted sum, surprisal_weight *
    surprisal + entropy_weight * entropy; `unit` is the drive over the sum of the absolute weights (0 where there are none).
    """

    surprisal: Array
    entropy: Array
    drive: Array
    unit: Array


class LoadController(Protocol):
    """A way from signals to loads."""

    def start(self, batch: int) -> State:
        """The state before the first step; every array has `batch` rows."""
        ...

    def step(self, signals: Signals, slope: float, state: State) -> tuple[Array, State]:
        """The loads [B] after this step, and the state for the next.

        Args:
            slope: what turns a multiplier into a load.
        """
        ...


class _Stateless:
    def start(self, batch: int) -> State:
        """Nothing is kept."""
        return ()


@dataclass(frozen=True)
class Still(_Stateless):
    """No response: m = 1. The baseline."""

    def step(self, signals: Signals, slope: float, state: State) -> tuple[Array, State]:
        return np.zeros_like(signals.drive), state


@dataclass(frozen=True)
class Exponential(_Stateless):
    """m = exp(-slope * drive), the drive clipped to -4..4; the default."""

    def step(self, signals: Signals, slope: float, state: State) -> tuple[Array, State]:
        return limited(signals.drive), state


@dataclass(frozen=True)
class Affine(_Stateless):
    """m = clip(1 - slope * drive, low, high). Its zero is the calibrated mean, where others have taken the median."""

    low: float = 0.25
    high: float = 4.0

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high)

    def step(self, signals: Signals, slope: float, state: State) -> tuple[Array, State]:
        return _load(np.clip(1 - slope * signals.drive, self.low, self.high), slope), state


@dataclass(frozen=True)
class Sigmoid(_Stateless):
    """m = low + (high - low) * sigmoid(-kappa * drive), where kappa gives it the slope of the others at its middle."""

    low: float = 0.5
    high: float = 1.5

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high)

    def step(self, signals: Signals, slope: float, state: State) -> tuple[Array, State]:
        kappa = 4 * slope / (self.high - self.low)
        # tanh: a sigmoid that does not overflow.
        sigmoid = (1 - np.tanh(kappa * signals.drive / 2)) / 2
        return _load(self.low + (self.high - self.low) * sigmoid, slope), state


@dataclass(frozen=True)
class Gate:
    """A dense step where both surprisal and entropy are above a percentile of the last `window` steps, else load 0.

    The test of the public code of CLADA, which then picks its neurons anew; a dense step does that here, because its row enters
    the prompt statistic. It opens only after `history` steps.
    """

    window: float = 10.0
    history: float = 6.0
    percentile: float = 70.0

    def __post_init__(self) -> None:
        _check_whole("window", self.window, 2)
        _check_whole("history", self.history, 1)
        if self.history > self.window:
            raise ValueError(f"history is {self.history:g}, and the window holds {self.window:g}")
        _check_percentile(self.percentile)

    def start(self, batch: int) -> State:
        return (np.full((batch, 2, int(self.window)), np.nan),)

    def step(self, signals: Signals, slope: float, state: State) -> tuple[Array, State]:
        (window,) = state
        now = np.stack((signals.surprisal, signals.entropy), axis=1)
        known = (~np.isnan(window[:, 0])).sum(-1) >= self.history
        load = np.zeros_like(signals.drive)
        if known.any():
            high = np.nanpercentile(window[known], self.percentile, axis=-1)
            load[known] = np.where((now[known] > high).all(-1), np.inf, 0.0)
        return load, (np.concatenate((window[:, :, 1:], now[:, :, None]), axis=-1),)


@dataclass(frozen=True)
class Rank:
    """load = spread * (2 q - 1), q the quantile of the drive among those so far (running, momentum `momentum`).

    Whatever the text, q is spread evenly over 0..1, so the mean of ln m is 0 and the mean sparsity stays where it was, up to
    the curvature of the sparsity in ln m.
    """

    spread: float = 0.7
    momentum: float = 0.02

    def __post_init__(self) -> None:
        _check_share("momentum", self.momentum)

    def start(self, batch: int) -> State:
        return _start_quantiles(batch)

    def step(self, signals: Signals, slope: float, state: State) -> tuple[Array, State]:
        quantile, state = _quantile(signals.unit, state, self.momentum)
        return self.spread * (2 * quantile - 1), state


@dataclass(frozen=True)
class Ladder:
    """A dense step where the drive is above a running percentile of those so far, else load 0."""

    percentile: float = 95.0
    momentum: float = 0.02

    def __post_init__(self) -> None:
        _check_percentile(self.percentile)
        _check_share("momentum", self.momentum)

    def start(self, batch: int) -> State:
        return _start_quantiles(batch)

    def step(self, signals: Signals, slope: float, state: State) -> tuple[Array, State]:
        quantile, state = _quantile(signals.unit, state, self.momentum)
        return np.where(quantile > self.percentile / 100, np.inf, 0.0), state


@dataclass(frozen=True)
class Refresh:
    """A dense step when the drive stays high: when its mean over `window` steps is above `level`; else load 0.

    The window is empty after a dense step, so the next can follow no sooner than `window` steps later.
    """

    level: float = 0.5
    window: float = 8.0

    def __post_init__(self) -> None:
        _check_whole("window", self.window, 1)

    def start(self, batch: int) -> State:
        return (np.full((batch, int(self.window)), np.nan),)

    def step(self, signals: Signals, slope: float, state: State) -> tuple[Array, State]:
        (window,) = state
        window = np.concatenate((window[:, 1:], signals.unit[:, None]), axis=1)
        high = window.mean(axis=1) > self.level  # NaN, a window that is not full, is not above
        return np.where(high, np.inf, 0.0), (np.where(high[:, None], np.nan, window),)


CONTROLLERS: dict[str, type[LoadController]] = {
    "exp": Exponential,
    "still": Still,
    "affine": Affine,
    "sigmoid": Sigmoid,
    "gate": Gate,
    "rank": Rank,
    "ladder": Ladder,
    "refresh": Refresh,
}


def make_controller(name: str, parameters: Mapping[str, float]) -> LoadController:
    """The controller that plans and manifests call `name`, under the key `rule`.

    Raises:
        ValueError: an unknown name or parameter, or a value out of range or that is no number.
    """
    if name not in CONTROLLERS:
        raise ValueError(f"unknown rule {name!r}; known: {', '.join(CONTROLLERS)}")
    kind = CONTROLLERS[name]
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(f"rule {name!r} has no parameter {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    for parameter, value in parameters.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
            raise ValueError(
                f"{parameter} is not a number that float32 holds: it must be between {-LARGEST:.3g} and {LARGEST:.3g}"
            )
    return kind(**{parameter: float(value) for parameter, value in parameters.items()})


def limited(drive: Values) -> Values:
    """A drive clipped to [-LOAD_LIMIT, LOAD_LIMIT]."""
    return drive.clip(-LOAD_LIMIT, LOAD_LIMIT)


def _load(multiplier: Array, slope: float) -> Array:
    """What the op turns into this multiplier; 0 where it does not respond at all."""
    return np.asarray(-np.log(multiplier) / slope) if slope else np.zeros_like(multiplier)


def _start_quantiles(batch: int) -> State:
    # Before any text the drive is taken to be normal, as far as its calibrated mean and deviation say.
    return (np.repeat(_NORMAL[None], batch, axis=0),)


def _quantile(value: Array, state: State, momentum: float) -> tuple[Array, State]:
    """The quantile of each row's value under its running distribution function, and that function after it."""
    (below,) = state
    found = np.array([np.interp(item, _GRID, row) for item, row in zip(value, below, strict=True)])
    return found, (below + momentum * ((value[:, None] <= _GRID) - below),)


def _check_bounds(low: float, high: float) -> None:
    if not 0 < low < high:
        raise ValueError(f"low is {low:g} and high is {high:g}; 0 < low < high is wanted")


def _check_whole(name: str, value: float, least: int) -> None:
    if not least <= value <= LONGEST_WINDOW or value != int(value):
        raise ValueError(f"{name} is {value:g}; it must be a whole number from {least} to {LONGEST_WINDOW}")


def _check_percentile(value: float) -> None:
    if not 0 <= value <= 100:
        raise ValueError(f"percentile is {value:g}; it must be between 0 and 100")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value:g}; it must be between 0 and 1")
