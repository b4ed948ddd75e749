"""Give every arm the mean sparsity of its still baseline: no response may win by computing more."""

from __future__ import annotations

import numpy as np
import torch

from clada_export.calibration.allocation import Allocation

POINTS = 2048
"""Multipliers that the mean sparsity is predicted from."""


def balanced_levels(
    allocation: Allocation, sparsity: float, multiplier: np.ndarray, exponents: np.ndarray | None = None
) -> np.ndarray:
    """The levels [layers] whose mean sparsity under these multipliers, and a power of them for each layer, is `sparsity`.

    Args:
        multiplier: any shape; 0 is a dense step.
        exponents: [layers], or None for 1.
    """
    values = multiplier.reshape(-1)
    values = values[:: max(1, -(-len(values) // POINTS))]
    # A dense step skips nothing, whatever the level: the others have to make up for it.
    dense = float((values == 0).mean())
    if dense == 1.0:
        return allocation.levels_at(allocation.knob_max)
    finite = values[values > 0]
    wanted = min(sparsity / (1.0 - dense), 1.0)
    if exponents is None:
        return allocation.levels_for(wanted, finite)
    low, high = 0.0, allocation.knob_max
    for _ in range(60):
        middle = (low + high) / 2
        if _mean_sparsity(allocation, allocation.levels_at(middle), finite, exponents) < wanted:
            low = middle
        else:
            high = middle
    return allocation.levels_at((low + high) / 2)


def _mean_sparsity(allocation: Allocation, levels: np.ndarray, multiplier: np.ndarray, exponents: np.ndarray) -> float:
    layers = allocation.layers
    shares = []
    for table, level, power in zip(layers.tables, levels, exponents, strict=True):
        factors = torch.from_numpy(np.asarray(multiplier**power, dtype=np.float32))
        shares.append(float(table.sparsity_at(layers.axis.moved(torch.tensor(float(level)), factors).numpy()).mean()))
    return float(np.average(shares, weights=layers.widths))
