"""CLADA: skip neurons whose estimated contribution is below a threshold; the prompt and the load move the threshold.

Our realisation of the idea of CLADA (arXiv 2502.19078), not the paper's equations. Three parts, each of which can be left out:

* the baseline threshold, from offline error control (CETT, arXiv 2402.03804);
* the backbone: with r_j the prompt statistic of neuron j over its mean (row-normalised, as Griffin, arXiv 2404.01365), the
  threshold of neuron j is multiplied by r_j ^ -gamma, so that neurons which the prompt used stay active longer;
* the load: surprisal and entropy of the token just emitted multiply all thresholds (`clada_export.load.signal`).

The score is

* `shadow`: |h_j| * ||W_d[:, j]|| with h estimated from 4-bit copies of gate and up, or
* `gate`: |act(W_g x)_j| (CATS, arXiv 2404.08763), for hidden sizes that the shadow can't block, or
* `exact`: |h_j| * ||W_d[:, j]||, the yardstick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clada_export.calibration.context import PolicyContext
from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UsageError
from clada_export.methods.common.policy import MethodPolicy
from clada_export.plan.method import Method, draft_layers
from graph_passes.op import SHADOW_BLOCK

GAMMAS = (0.1,)
"""Exponents of the prompt statistic that are tried beside none. On SmolLM2 at 49% (4 windows), 0.1 lowers KL by 3%, 0.25 and
0.5 raise it by 2% and 5%, and dropping neurons below 0.2 of the mean raises it by half."""


@dataclass(frozen=True, kw_only=True)
class CladaPolicy(MethodPolicy):
    """Score `shadow`, `gate` or `exact`, rule `threshold`."""

    name: str = "clada"
    scores: tuple[str, ...] = ("shadow", "gate", "exact")
    responds: bool = True

    def check(self, ffns: Sequence[EagerFFN]) -> None:
        """Refuse an unknown score, or a hidden size that the shadow does not fit."""
        super().check(ffns)
        misfit = _misfit(ffns)
        if self.settings.score == "shadow" and misfit is not None:
            raise UsageError(
                f"score 'shadow' needs a hidden size divisible by {SHADOW_BLOCK}; {misfit.name} has {misfit.hidden_size}. "
                "Use --score gate"
            )

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """Without the prompt, and with it at several weights; `shadow` where every hidden size is a multiple of 32."""
        self.check(context.ffns)
        score = self.settings.score or ("gate" if _misfit(context.ffns) is not None else "shadow")
        allocations = ("sparsity", "fisher") if score == "gate" else ("sensitivity", "fisher")
        methods = [Method("no prior", score, "threshold", draft_layers(context.ffns), allocations=allocations)]
        for gamma in GAMMAS if self.settings.prior else ():
            layers = draft_layers(context.ffns, prior_gamma=gamma)
            methods.append(Method(f"prior {gamma:g}", score, "threshold", layers, allocations=allocations))
        return tuple(methods)


def _misfit(ffns: Sequence[EagerFFN]) -> EagerFFN | None:
    return next((ffn for ffn in ffns if ffn.hidden_size % SHADOW_BLOCK), None)
