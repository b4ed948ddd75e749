"""The FFN weights of the eager model while it is calibrated: pruned or adapted for one plan, restored for the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.methods.pruning import PruneReport, PruneSpec, prune
from clada_export.methods.pruning.projections import Snapshot
from clada_export.plan.adapters import apply_adapters
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.tensors import LayerTensors


class FFNWeights:
    """Prunes, adds adapters, and restores.

    Args:
        windows: int64 [N, context], the calibration text.
        rounded: called after the weights have changed; puts them back on the grid of the engine's type.
    """

    def __init__(self, decoder: Decoder, windows: Tensor, rounded: Callable[[], None] = lambda: None) -> None:
        self._decoder, self._windows, self._rounded = decoder, windows, rounded
        self._originals: Snapshot | None = None
        self._adapted = False
        self.report: PruneReport | None = None

    @property
    def spec(self) -> PruneSpec | None:
        """How the weights are pruned now."""
        return None if self.report is None else self.report.spec

    def use(self, spec: PruneSpec | None, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Bring the weights into the state `spec` (None: as they were), without adapters.

        Raises:
            UsageError: as `clada_export.methods.pruning.prune`.
        """
        if spec == self.spec and not self._adapted:
            return
        self._restore()
        if spec is not None:
            self._keep()
            self.report = prune(self._decoder, self._windows, spec, progress)
            self._rounded()

    def adapt(self, arrays: Mapping[str, LayerTensors]) -> None:
        """Add the adapters, if there are any, to the weights as `use` has left them.

        Raises:
            UsageError: adapters that do not fit.
        """
        if not any(tensors.adapters for tensors in arrays.values()):
            return
        self._keep()
        self._adapted = apply_adapters(self._decoder.ffns, arrays)
        self._rounded()

    def follow(self, plan: SparsityPlan) -> None:
        """Bring the weights into the state that a plan was made for, and its engine has.

        Raises:
            UsageError: as `use` and `adapt`.
        """
        self.use(None if plan.prune is None else PruneSpec.parse(plan.prune))
        self.adapt(plan.arrays)

    @property
    def adapted(self) -> bool:
        """Whether there are adapters in them."""
        return self._adapted

    def _keep(self) -> None:
        self._originals = self._originals or Snapshot(self._decoder.ffns)

    def _restore(self) -> None:
        if self._originals is not None and (self.report is not None or self._adapted):
            self._originals.restore()
        self.report, self._adapted = None, False
