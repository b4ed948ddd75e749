"""CATS (arXiv 2404.08763): keep neuron j where |act(W_g x)_j| reaches the layer's threshold.

The threshold is a percentile of the calibration text's gate activations, the same percentile in every layer as published. The
gate is computed for all neurons; rows of up and down are saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UsageError
from clada_export.methods.common.single import SinglePolicy


@dataclass(frozen=True, kw_only=True)
class CATSPolicy(SinglePolicy):
    """Score `gate`, rule `threshold`."""

    name: str = "cats"
    scores: tuple[str, ...] = ("gate",)
    rule: str = "threshold"
    allocations: tuple[str, ...] = ("sparsity", "fisher")

    def check(self, ffns: Sequence[EagerFFN]) -> None:
        """Refuse FFNs without a gate."""
        super().check(ffns)
        plain = next((ffn for ffn in ffns if not ffn.gated), None)
        if plain is not None:
            raise UsageError(f"policy {self.name!r} reads the gate, and {plain.name} has none; use --policy clada or tt")
