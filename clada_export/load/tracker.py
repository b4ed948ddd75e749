"""A batch followed step by step: standardised signals in, loads out, and what a controller remembers of each row in between."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clada_export.load.controllers import Signals, State, make_controller
from clada_export.load.signal import LoadSignal, standardised
from clada_export.load.values import LARGEST, Array, in_float32


class LoadTracker:
    """The load of every row of a batch, step by step.

    Args:
        signal: statistics, weights and controller.

    Raises:
        ValueError: a controller that is not known, or its parameters.
    """

    def __init__(self, signal: LoadSignal) -> None:
        self._signal = signal
        self._controller = make_controller(signal.rule, signal.parameters)
        self._calibrated = np.array(
            [[signal.surprisal_mean, signal.entropy_mean], [signal.surprisal_std, signal.entropy_std]], dtype=np.float64
        )
        self._state: State = ()
        self._moments: Array = np.empty((0, 2, 2))

    def start(self, batch: int) -> None:
        """Forget what was seen; the next step is the first of `batch` rows."""
        self._state = self._controller.start(batch)
        self._moments = np.repeat(self._calibrated[None], batch, axis=0)

    def step(self, surprisal: npt.ArrayLike, entropy: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """The load of the next step.

        With a `momentum` b the mean and the standard deviation follow the text, from the calibrated ones on: each step is
        judged by what came before it, and then mean <- mean + b (value - mean), var <- (1 - b) (var + b (value - mean)^2).

        Args:
            surprisal, entropy: nats, [B]. Another number of rows than before starts anew.

        Returns:
            [B], never NaN or -inf; +inf (dense) where a signal is not finite, and the row's state is then left as it was.
        """
        values: Array = np.stack((np.asarray(surprisal), np.asarray(entropy)), axis=-1).astype(np.float64)
        if len(values) != len(self._moments):
            self.start(len(values))
        finite = np.isfinite(values[:, 0]) & np.isfinite(values[:, 1])
        known = np.where(finite[:, None], values, self._calibrated[0])
        # Signals of any size are welcome: what overflows is told apart below.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            load = self._next(known, finite)
        if not (finite & np.isfinite(load)).all():
            # A controller's -inf is a number that was too small for float64, not a row that is to be skipped.
            load = np.where(np.isneginf(load), -LARGEST, load)
            load = np.where(finite & ~np.isnan(load), load, np.inf)
        return in_float32(load)

    def _next(self, known: Array, finite: npt.NDArray[np.bool_]) -> Array:
        mean, deviation = self._moments[:, 0], self._moments[:, 1]
        surprisal, entropy = standardised(known, mean, deviation).T
        drive = self._signal.drive(surprisal, entropy)
        total = abs(self._signal.surprisal_weight) + abs(self._signal.entropy_weight)
        signals = Signals(surprisal, entropy, drive, drive / total if total else np.zeros_like(drive))
        load, state = self._controller.step(signals, self._signal.slope, self._state)
        if self._signal.momentum:
            moved = np.stack(_moved(known, mean, deviation, self._signal.momentum), axis=1)
            self._moments = _where(finite, moved, self._moments)
        self._state = tuple(_where(finite, new, old) for new, old in zip(state, self._state, strict=True))
        return load


def loads_along(signal: LoadSignal, surprisal: npt.NDArray[np.floating], entropy: npt.NDArray[np.floating]) -> Array:
    """The loads [N, T] that follow from the signals [N, T] (nats) of N texts, from left to right."""
    tracker = LoadTracker(signal)
    tracker.start(len(surprisal))
    steps = [tracker.step(surprisal[:, place], entropy[:, place]) for place in range(surprisal.shape[1])]
    return np.stack(steps, axis=1).astype(np.float64) if steps else np.zeros(surprisal.shape)


def _moved(value: Array, mean: Array, deviation: Array, momentum: float) -> tuple[Array, Array]:
    error = value - mean
    variance = (1 - momentum) * (np.square(deviation) + momentum * np.square(error))
    return mean + momentum * error, np.sqrt(np.maximum(variance, 1e-12))


def _where(rows: npt.NDArray[np.bool_], new: Array, old: Array) -> Array:
    return np.where(rows.reshape(-1, *([1] * (new.ndim - 1))), new, old)
