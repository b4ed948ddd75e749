"""The FFN weights of the eager model while it is calibrated: pruned or adapted for one plan, restored for the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn.projections import Snapshot
from clada_export.plan.adapters import apply_adapters
from clada_export.plan.tensors import LayerTensors

Made = TypeVar("Made")


class PruningReport(Protocol):
    """What a pruning did."""

    @property
    def kept(self) -> Mapping[str, np.ndarray]:
        """The neurons that are left of each FFN, int64 ascending, by name; FFNs that are whole are not in it."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings for a plan."""
        ...


class Pruning(Protocol):
    """A way to prune the FFN weights; equal ones give equal weights, and `str` is how a plan says it."""

    def apply(self, decoder: Decoder, windows: Tensor, progress: Callable[[int, int], None]) -> PruningReport:
        """Prune in place.

        Args:
            windows: int64 [N, context], the calibration text.
            progress: called with (FFNs done, FFNs in all).

        Raises:
            UsageError: the model can't be pruned so; its weights are then what they were.
        """
        ...


class FFNWeights:
    """Prunes, adds adapters, and restores.

    Args:
        windows: int64 [N, context], the calibration text.
        rounded: called after the weights have changed; puts them back on the grid of the engine's type.
    """

    def __init__(self, decoder: Decoder, windows: Tensor, rounded: Callable[[], None] = lambda: None) -> None:
        self._decoder, self._windows, self._rounded = decoder, windows, rounded
        self._originals: Snapshot | None = None
        self.adapters: Mapping[str, LayerTensors] = {}
        """The arrays whose adapters are in the weights now."""
        self.pruning: Pruning | None = None
        """How the weights are pruned now; `report` is what that did."""
        self.report: PruningReport | None = None

    def use(self, pruning: Pruning | None, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Bring the weights into the state that a pruning leaves (None: as they were), without adapters.

        Raises:
            UsageError: as `Pruning.apply`.
        """
        if pruning == self.pruning and not self.adapted:
            return
        self._restore()
        if pruning is not None:
            self._keep()
            self.report = pruning.apply(self._decoder, self._windows, progress)
            self.pruning = pruning
            self._rounded()

    def adapt(self, arrays: Mapping[str, LayerTensors]) -> None:
        """Add the adapters, if there are any, to the weights as `use` has left them.

        Raises:
            UsageError: adapters that do not fit.
        """
        if not any(tensors.adapters for tensors in arrays.values()):
            return
        self._keep()
        self.adapters = arrays if apply_adapters(self._decoder.ffns, arrays) else {}
        self._rounded()

    def follow(self, pruning: Pruning | None, arrays: Mapping[str, LayerTensors]) -> None:
        """Bring the weights into the state that a plan with these arrays was made for, and its engine has.

        Raises:
            UsageError: as `use` and `adapt`.
        """
        self.use(pruning)
        self.adapt(arrays)

    @property
    def adapted(self) -> bool:
        """Whether there are adapters in them."""
        return bool(self.adapters)

    def as_given(self, make: Callable[[], Made]) -> Made:
        """Call with the weights as they were given; they are after it what they were before."""
        if self._originals is None or not self.changed:
            return make()
        changed = Snapshot(self._decoder.ffns)
        self._originals.restore()
        try:
            return make()
        finally:
            changed.restore()

    @property
    def changed(self) -> bool:
        """Whether they are not as they were given."""
        return self.report is not None or self.adapted

    def _keep(self) -> None:
        self._originals = self._originals or Snapshot(self._decoder.ffns)

    def _restore(self) -> None:
        if self._originals is not None and self.changed:
            self._originals.restore()
        self.pruning, self.report, self.adapters = None, None, {}
