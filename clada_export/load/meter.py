"""The load signal: how surprising the last token was and how unsure the model is, turned into the load of the next step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from clada_export.errors import UsageError
from clada_export.load.controllers import LOAD_LIMIT
from clada_export.load.signal import LoadSignal
from clada_export.load.surprisal import surprisal_entropy
from clada_export.load.tracker import LoadTracker
from clada_export.load.values import Array, load_array

LoadFunction: TypeAlias = Callable[[Array, Array], npt.ArrayLike]
"""A signal from outside: (surprisal [B], entropy [B]), in nats, to load [B]; +inf is dense."""


class LoadMeter:
    """Turns the logits of a batch and the tokens taken from them into the load of its next step.

    Controllers with a memory remember it row by row: one meter for each batch, and its rows always in the same order.

    Args:
        signal: statistics, weights and controller, from the manifest; or a function that gives the loads in its place.

    Raises:
        ValueError: the signal names a controller that is not known.
    """

    def __init__(self, signal: LoadSignal | LoadFunction) -> None:
        self.signal = signal
        self._step = LoadTracker(signal).step if isinstance(signal, LoadSignal) else _checked(signal)

    def update(
        self,
        logits: npt.NDArray[np.floating],
        tokens: npt.ArrayLike,
        *,
        log_sum_exp: npt.NDArray[np.floating] | None = None,
        entropy: npt.NDArray[np.floating] | None = None,
    ) -> npt.NDArray[np.float32]:
        """The load of each row.

        Args:
            logits: [B, V], raw, from the pass before.
            tokens: [B], taken from them.
            log_sum_exp, entropy: [B], of these logits, if the graph gave them; computed otherwise.

        Returns:
            [B] float32, within [-4, 4] by controller `exp`; +inf (dense) for a row with a logit that is not finite.

        Raises:
            UsageError: a function from outside that returns something else than a load for each row.
        """
        return self._step(*surprisal_entropy(logits, tokens, log_sum_exp, entropy))


def _checked(
    function: LoadFunction,
) -> Callable[[Array, Array], npt.NDArray[np.float32]]:
    """The function, its result held to what the engine takes; rows without a finite signal are dense whatever it says."""

    def step(surprisal: Array, entropy: Array) -> npt.NDArray[np.float32]:
        loads = load_array(function(surprisal, entropy), "load: what the function returned")
        if loads.shape != surprisal.shape:
            raise UsageError(f"load: the function returned shape {loads.shape}; one load a row is wanted: {surprisal.shape}")
        finite = np.isfinite(surprisal) & np.isfinite(entropy)
        if np.isnan(loads[finite]).any() or np.isneginf(loads).any():
            raise UsageError("load: the function returned NaN or -inf; give a number for each row, or +inf for dense")
        return np.where(finite, loads, np.float32(np.inf))

    return step


__all__ = ["LOAD_LIMIT", "LoadFunction", "LoadMeter", "surprisal_entropy"]
