"""Static pruning as a policy: Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774), the baselines without dynamics.

The sparsity is that of the weights (of the neurons, with `--pattern neurons`); every neuron that is left runs for every token.
`--prune` composes the same with any dynamic policy. See `docs/pruning.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UsageError
from clada_export.methods.base import PolicyContext, PolicySettings, check_score
from clada_export.methods.pruning import PruneSpec
from clada_export.plan.method import Method, draft_layers


@dataclass(frozen=True)
class StaticPolicy:
    """Weights are pruned and nothing is skipped: a threshold of zero."""

    name: str
    trained: bool = False
    responds: bool = False
    merges: bool = False
    finetunes: bool = False
    scores: tuple[str, ...] = ("gate",)

    def check(self, ffns: Sequence[EagerFFN], settings: PolicySettings) -> None:
        """Any FFN will do; a pattern must be known."""
        check_score(self.name, self.scores, settings)
        self.prune_at(0.5, settings)

    def prune_at(self, sparsity: float, settings: PolicySettings) -> PruneSpec | None:
        """How weights are pruned at a sparsity.

        Raises:
            UsageError: the pattern is not known, or has another sparsity.
        """
        pattern = settings.pattern or "unstructured"
        if ":" not in pattern:
            return PruneSpec(self.name, pattern, sparsity)
        spec = PruneSpec.parse(f"{self.name}={pattern}")
        if abs(spec.sparsity - sparsity) > 1e-6:
            raise UsageError(f"--pattern {pattern} is a sparsity of {spec.sparsity:g}, not {sparsity:g}; give --sparsity so")
        return spec

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """One method, in which every neuron runs."""
        layers = draft_layers(context.ffns)
        return (Method(self.name, "gate", "threshold", layers, allocations=("dense",)),)
