"""Share a mean sparsity out over the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from clada_export.calibration.axis import Axis
from clada_export.calibration.statistics import LayerTable

Levels = Callable[[float], np.ndarray]

SMALLEST_PRICE = 1e-30
"""What is cheaper costs this."""


@dataclass(frozen=True)
class Layers:
    """What an allocation is made from: for each FFN its table, its width (neurons) and its price (`sensitivity`)."""

    axis: Axis
    tables: tuple[LayerTable, ...]
    widths: tuple[int, ...]
    sensitivity: tuple[float, ...]


@dataclass(frozen=True)
class Allocation:
    """A family of per-layer levels with one knob; a larger knob never lowers a level.

    `name` says how the layers share: see `ALLOCATIONS`.
    """

    name: str
    levels_at: Levels
    knob_max: float
    layers: Layers

    def mean_sparsity(self, levels: np.ndarray, multiplier: np.ndarray | None = None) -> float:
        """The share of all neurons that is skipped.

        Args:
            levels: [layers].
            multiplier: [tokens], m(load) of each token; None is 1.
        """
        shares = []
        for table, level in zip(self.layers.tables, levels, strict=True):
            moved: float | np.ndarray = float(level)
            if multiplier is not None:
                factors = torch.from_numpy(np.asarray(multiplier, dtype=np.float32))
                moved = self.layers.axis.moved(torch.tensor(moved), factors).numpy()
            shares.append(float(table.sparsity_at(moved).mean()))
        return float(np.average(shares, weights=self.layers.widths))

    def predicted_kl(self, levels: np.ndarray) -> float:
        """What the tables and the prices make of levels [layers], nats a token, as if errors of layers added up and the second
        order were all: good for how KL grows, less so for how large it is."""
        rows = zip(self.layers.tables, self.layers.sensitivity, levels, strict=True)
        return float(sum(0.5 * price**2 * np.interp(level, table.coarse_level, table.error) for table, price, level in rows))

    def levels_for(self, sparsity: float, multiplier: np.ndarray | None = None) -> np.ndarray:
        """The levels whose mean sparsity (under the multiplier) is `sparsity`, by bisection on the knob."""
        low, high = 0.0, self.knob_max
        for _ in range(60):
            middle = (low + high) / 2
            if self.mean_sparsity(self.levels_at(middle), multiplier) < sparsity:
                low = middle
            else:
                high = middle
        return self.levels_at((low + high) / 2)


def same_cett(layers: Layers) -> tuple[Levels, float]:
    """Every layer at the same CETT (arXiv 2402.03804: one target for all layers, one threshold each)."""
    highest = max(float(table.cett[-1]) for table in layers.tables)
    return lambda target: np.array([table.level_for_cett(target) for table in layers.tables]), highest


def same_sparsity(layers: Layers) -> tuple[Levels, float]:
    """Every layer skips the same share (Griffin's one k, CATS's one percentile)."""
    return lambda share: np.array([table.level_for(share) for table in layers.tables]), 1.0


def same_level(layers: Layers) -> tuple[Levels, float]:
    """Every layer has the same level: routers whose scores mean the same everywhere (a gate's 0.5)."""
    highest = max(float(table.level[-1]) for table in layers.tables)
    return lambda level: np.full(len(layers.tables), level), highest


def all_dense(layers: Layers) -> tuple[Levels, float]:
    """Nothing is skipped: static pruning alone."""
    return lambda knob: np.zeros(len(layers.tables)), 1.0


def same_price(layers: Layers) -> tuple[Levels, float]:
    """A neuron of any layer is dropped below the same price: level = knob / sensitivity. For scores that are the norm of a
    neuron's output (our own derivation)."""
    price = np.maximum(np.array(layers.sensitivity, dtype=np.float64), SMALLEST_PRICE)
    highest = np.array([table.level[-1] for table in layers.tables])
    return lambda knob: np.asarray(np.minimum(knob / price, highest)), float((highest * price).max())


def same_marginal_cost(layers: Layers) -> tuple[Levels, float]:
    """The next neuron to drop costs the same KL in every layer (our own derivation).

    By `sensitivity`, a layer's error raises KL by 1/2 * sensitivity^2 * E||error||^2. The tables have that as a function of the
    layer's sparsity; its slope, made to ascend, is the price of one more neuron, and the layers share one.
    """
    shares, slopes = [], []
    for table, width, price in zip(layers.tables, layers.widths, layers.sensitivity, strict=True):
        share = table.sparsity_at(table.coarse_level)
        cost = 0.5 * price**2 * table.error
        slope = np.diff(cost) / np.maximum(np.diff(share) * width, 1e-12)
        shares.append(np.concatenate(([share[0]], (share[1:] + share[:-1]) / 2, [share[-1]])))
        slopes.append(np.maximum.accumulate(np.concatenate(([0.0], slope, [slope[-1]]))))
    # Nothing costs anything where all FFNs give 0, or none reaches the logits: then any order will do.
    ascents = [float(slope[slope > 0].min()) for slope in slopes if (slope > 0).any()]
    # Prices span orders of magnitude, so the knob is their logarithm, shifted to begin at 0.
    least = max(min(ascents, default=1.0) / 10, SMALLEST_PRICE)
    logs = [np.log(np.maximum(slope, least) / least) + np.arange(len(slope)) * 1e-9 for slope in slopes]

    def levels_at(knob: float) -> np.ndarray:
        chosen = [np.interp(knob, log, share) for log, share in zip(logs, shares, strict=True)]
        return np.array([table.level_for(float(share)) for table, share in zip(layers.tables, chosen, strict=True)])

    return levels_at, max(float(log[-1]) for log in logs)


ALLOCATIONS: dict[str, Callable[[Layers], tuple[Levels, float]]] = {
    "cett": same_cett,
    "sparsity": same_sparsity,
    "level": same_level,
    "sensitivity": same_price,
    "fisher": same_marginal_cost,
    "dense": all_dense,
}


def allocate(name: str, layers: Layers) -> Allocation:
    """The allocation called `name`."""
    levels_at, knob_max = ALLOCATIONS[name](layers)
    return Allocation(name, levels_at, knob_max, layers)
