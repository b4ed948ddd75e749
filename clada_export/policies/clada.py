"""CLADA: skip neurons whose estimated contribution is below a threshold, and let the load move the threshold.

Our realisation of the idea of CLADA (arXiv 2502.19078), not the paper's equations: the base threshold comes from offline error
control (CETT, arXiv 2402.03804), and surprisal and entropy of the token just emitted multiply it. The score is

* `shadow`: |h_j| * ||W_d[:, j]|| with h estimated from 4-bit copies of gate and up, or
* `gate`: |act(W_g x)_j| (CATS, arXiv 2404.08763), for hidden sizes that the shadow can't block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clada_export.errors import UsageError
from clada_export.ffn import EagerFFN
from graph_passes.op import SHADOW_BLOCK


@dataclass(frozen=True)
class CladaPolicy:
    """Score `shadow`, `gate` or `exact`, rule `threshold`."""

    name: str = "clada"
    rule: str = "threshold"
    scores: tuple[str, ...] = ("shadow", "gate", "exact")

    def score_for(self, ffns: Sequence[EagerFFN], wanted: str | None) -> str:
        """`wanted`, or `shadow` where every hidden size is a multiple of 32, else `gate`.

        Raises:
            UsageError: `wanted` is none of the policy's scores, or a hidden size does not fit the shadow.
        """
        if wanted is not None and wanted not in self.scores:
            raise UsageError(f"policy {self.name!r} has no score {wanted!r}; its scores: {', '.join(self.scores)}")
        misfit = next((ffn for ffn in ffns if ffn.hidden_size % SHADOW_BLOCK), None)
        if wanted == "shadow" and misfit is not None:
            raise UsageError(
                f"score 'shadow' needs a hidden size divisible by {SHADOW_BLOCK}; {misfit.name} has {misfit.hidden_size}. "
                "Use --score gate"
            )
        return wanted or ("gate" if misfit is not None else "shadow")
