"""Fit how much the load should move the thresholds, at equal mean sparsity, or find that it should not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clada_export.calibration.allocation import Allocation
from clada_export.calibration.drift import Drift, DriftMeter
from clada_export.calibration.selector import MethodSelectors
from clada_export.calibration.statistics import LayerTable
from clada_export.load.signal import LoadSignal
from clada_export.op.reference import load_multiplier
from clada_export.plan.record import TriedResponse
from graph_passes.op import SparseFFNAttributes

LOAD_SLOPE = 0.25
"""The op's slope. It gives `load` its unit as a speed knob: +1 multiplies every threshold by exp(-0.25)."""
EFFECTIVE_SLOPES = (0.1, 0.05)
"""Slopes tried for one standard deviation of the signal, the smaller only where the larger does not help; still larger ones
lose (`docs/load-signal.md`)."""

Measure = Callable[[MethodSelectors, np.ndarray, Tensor, Callable[[Drift], bool]], Drift]

ERROR_STEP = 1.15
"""The error target is moved by this factor, up and down, to see what a layer's level does."""


@dataclass(frozen=True)
class LoadResponse:
    """The fitted signal, the levels that keep the mean sparsity under it, and what was tried."""

    signal: LoadSignal
    levels: np.ndarray
    drift: Drift
    tried: tuple[TriedResponse, ...]


def multiplier_of(signal: LoadSignal, signals: Tensor, context: int) -> Tensor:
    """m(load) for every token, float32 [N, context].

    Args:
        signals: surprisal and entropy [N, 2, context - 1] of token t + 1 given tokens up to t. A window's first token has
            none and takes load 0.
    """
    load = torch.zeros(len(signals), context)
    load[:, 1:] = signal.exponential_load(signals[:, 0], signals[:, 1])
    return load_multiplier(load, SparseFFNAttributes(load_slope=LOAD_SLOPE))


def error_slopes(tables: Sequence[LayerTable], levels: np.ndarray) -> np.ndarray:
    """How each layer's level follows its error target: d ln level / d ln CETT [layers], within 0.25..4.

    With them as powers, one multiplier moves the error target of all layers alike: tau_l(m * eps) = tau_l(eps) * m^power to
    first order. In a plan they are factors of `load_slope`. Our own derivation, around the levels.
    """
    found = []
    for table, level in zip(tables, levels, strict=True):
        target = max(table.cett_at(float(level)), 1e-6)
        low, high = (max(table.level_for_cett(target * factor), 1e-30) for factor in (1 / ERROR_STEP, ERROR_STEP))
        found.append(math.log(high / low) / math.log(ERROR_STEP**2))
    return np.asarray(np.clip(np.array(found), 0.25, 4.0))


def fit_load_response(
    meter: DriftMeter,
    measure: Measure,
    layers: MethodSelectors,
    allocation: Allocation,
    sparsity: float,
    base: LoadSignal,
    still: Drift,
    levels: np.ndarray,
) -> LoadResponse:
    """Try surprisal and entropy with small slopes against no response.

    One that gains nothing on the first windows is not measured on the others. A response is taken only if its mean KL is lower
    by more than one standard error of the paired difference over windows; the weights of the signal are zero otherwise.

    Args:
        meter: has the held-out windows' signals.
        measure: the drift of layers at levels [layers] under m(load) [N, context]; the last argument is asked whether the
            windows so far are enough.
        still: the drift without a response, at `levels`.
    """
    tried: list[TriedResponse] = []

    def no_gain(drift: Drift) -> bool:
        return drift.gain_over(still.upto(drift))[0] <= 0.0

    best = LoadResponse(base, levels, still, ())
    for name, weights in (("surprisal", (1.0, 0.0)), ("entropy", (0.0, 1.0))):
        for slope in EFFECTIVE_SLOPES:
            scale = slope / LOAD_SLOPE
            signal = replace(base, surprisal_weight=weights[0] * scale, entropy_weight=weights[1] * scale)
            multiplier = multiplier_of(signal, meter.signals, meter.context)
            decided = multiplier[:, meter.prompt :].flatten()
            rescaled = allocation.levels_for(sparsity, decided[:: max(1, decided.numel() // 512)].numpy())
            drift = measure(layers, rescaled, multiplier, no_gain)
            same = still.upto(drift)
            gain, error = drift.gain_over(same)
            # More active neurons than the still plan would be an unfair gain.
            fair = drift.sparsity >= still.sparsity - 0.002
            whole = len(drift.nll) == len(still.nll)
            taken = bool(whole and gain > error and fair and drift.mean_kl < best.drift.mean_kl)
            tried.append(
                TriedResponse(
                    signal=name,
                    slope=slope,
                    kl=drift.mean_kl,
                    kl_without=same.mean_kl,
                    gain=gain,
                    standard_error=error if math.isfinite(error) else -1.0,
                    sparsity=drift.sparsity,
                    better=taken,
                )
            )
            if taken:
                best = LoadResponse(signal, rescaled, drift, ())
            if gain > error:
                break
    return LoadResponse(best.signal, best.levels, best.drift, tuple(tried))
