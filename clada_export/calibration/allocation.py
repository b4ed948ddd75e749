"""Share a mean sparsity out over the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clada_export.calibration.statistics import LayerTable
from clada_export.ffn import EagerFFN


@dataclass(frozen=True)
class Allocation:
    """A family of per-layer thresholds with one knob; a larger knob never lowers a threshold.

    `name` says how the layers share: `uniform` gives every layer the same relative error (CETT), `sensitivity` the same price
    in the model's output (`clada_export.calibration.sensitivity`).
    """

    name: str
    thresholds_at: Callable[[float], np.ndarray]
    knob_max: float
    tables: tuple[LayerTable, ...]
    weights: np.ndarray

    def mean_sparsity(self, thresholds: np.ndarray, multiplier: np.ndarray | None = None) -> float:
        """The share of all neurons that is skipped.

        Args:
            thresholds: [layers].
            multiplier: [tokens], m(load) of each token; None is 1.
        """
        factors = np.ones(1) if multiplier is None else multiplier
        shares = [
            float(table.sparsity_at(threshold * factors).mean())
            for table, threshold in zip(self.tables, thresholds, strict=True)
        ]
        return float(np.dot(self.weights, shares))

    def thresholds_for(self, sparsity: float, multiplier: np.ndarray | None = None) -> np.ndarray:
        """The thresholds whose mean sparsity (under the multiplier) is `sparsity`, by bisection on the knob."""
        low, high = 0.0, self.knob_max
        for _ in range(60):
            middle = (low + high) / 2
            if self.mean_sparsity(self.thresholds_at(middle), multiplier) < sparsity:
                low = middle
            else:
                high = middle
        return self.thresholds_at((low + high) / 2)


def _weights(ffns: Sequence[EagerFFN]) -> np.ndarray:
    sizes = np.array([ffn.intermediate_size for ffn in ffns], dtype=np.float64)
    return np.asarray(sizes / sizes.sum())


def uniform_cett(ffns: Sequence[EagerFFN], tables: Sequence[LayerTable]) -> Allocation:
    """Every layer at the same CETT (one target for all layers, one threshold each)."""

    def thresholds_at(target: float) -> np.ndarray:
        return np.array([table.threshold_for_cett(target) for table in tables])

    return Allocation("uniform", thresholds_at, 1.0, tuple(tables), _weights(ffns))


def by_sensitivity(ffns: Sequence[EagerFFN], tables: Sequence[LayerTable], sensitivity: Sequence[float]) -> Allocation:
    """A neuron of any layer is dropped below the same price: threshold_l = knob / sensitivity_l."""
    price = np.maximum(np.array(sensitivity, dtype=np.float64), 1e-30)
    highest = np.array([table.threshold[-1] for table in tables])

    def thresholds_at(knob: float) -> np.ndarray:
        return np.asarray(np.minimum(knob / price, highest))

    return Allocation("sensitivity", thresholds_at, float((highest * price).max()), tuple(tables), _weights(ffns))
