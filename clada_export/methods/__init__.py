"""The methods, one a file."""

from __future__ import annotations

from clada_export.errors import UsageError
from clada_export.methods.base import Policy, PolicyContext, PolicySettings
from clada_export.methods.cats import CATS
from clada_export.methods.clada import CladaPolicy
from clada_export.methods.d2dmoe import D2DMoEPolicy
from clada_export.methods.dejavu import DejaVuPolicy
from clada_export.methods.ds_moe import DSMoEPolicy
from clada_export.methods.griffin import GRIFFIN
from clada_export.methods.llama_moe import LlamaMoEPolicy
from clada_export.methods.lory import LoryPolicy
from clada_export.methods.lte import LTEPolicy
from clada_export.methods.moefication import MoEficationPolicy
from clada_export.methods.static import StaticPolicy
from clada_export.methods.tda import TDA
from clada_export.methods.tt import TT

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        CladaPolicy(),
        GRIFFIN,
        TDA,
        TT,
        CATS,
        DejaVuPolicy(),
        MoEficationPolicy(),
        LTEPolicy(),
        D2DMoEPolicy(),
        LlamaMoEPolicy(),
        DSMoEPolicy(),
        LoryPolicy(),
        StaticPolicy("wanda"),
        StaticPolicy("sparsegpt"),
    )
}


def get_policy(name: str) -> Policy:
    """The policy called `name`.

    Raises:
        UsageError: there is none; lists those that exist.
    """
    if name not in POLICIES:
        raise UsageError(f"unknown policy {name!r}; known: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]


__all__ = ["POLICIES", "Policy", "PolicyContext", "PolicySettings", "get_policy"]
