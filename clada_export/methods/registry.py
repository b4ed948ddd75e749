"""The policies, by the name that `--policy` takes. A new one is a file or folder beside this one, and a line here."""

from __future__ import annotations

from dataclasses import replace

from clada_export.errors import UsageError
from clada_export.methods.cats import CATSPolicy
from clada_export.methods.clada import CladaPolicy
from clada_export.methods.common.policy import MethodPolicy
from clada_export.methods.d2dmoe.policy import D2DMoEPolicy
from clada_export.methods.dejavu.policy import DejaVuPolicy
from clada_export.methods.ds_moe.policy import DSMoEPolicy
from clada_export.methods.griffin import GRIFFIN
from clada_export.methods.llama_moe.policy import LlamaMoEPolicy
from clada_export.methods.lory.policy import LoryPolicy
from clada_export.methods.lte.policy import LTEPolicy
from clada_export.methods.moefication.policy import MoEficationPolicy
from clada_export.methods.settings import PolicySettings
from clada_export.methods.static.policy import StaticPolicy
from clada_export.methods.tda import TDA
from clada_export.methods.tt import TT

POLICIES: dict[str, MethodPolicy] = {
    policy.name: policy
    for policy in (
        CladaPolicy(),
        GRIFFIN,
        TDA,
        TT,
        CATSPolicy(),
        DejaVuPolicy(),
        MoEficationPolicy(),
        LTEPolicy(),
        D2DMoEPolicy(),
        LlamaMoEPolicy(),
        DSMoEPolicy(),
        LoryPolicy(),
        StaticPolicy(name="wanda"),
        StaticPolicy(name="sparsegpt"),
    )
}


def get_policy(name: str, settings: PolicySettings | None = None) -> MethodPolicy:
    """The policy called `name`, with what a user asked of it.

    Raises:
        UsageError: there is none; lists those that exist. Or it is to train the model's weights and can't; names those that do.
    """
    if name not in POLICIES:
        raise UsageError(f"unknown policy {name!r}; known: {', '.join(sorted(POLICIES))}")
    policy = POLICIES[name]
    if settings is not None and settings.finetune and not policy.finetunes:
        able = " or ".join(other.name for other in POLICIES.values() if other.finetunes)
        raise UsageError(f"--finetune: policy {name!r} does not train the model's weights; use --policy {able}")
    return policy if settings is None else replace(policy, settings=settings)


def all_policies(settings: PolicySettings) -> dict[str, MethodPolicy]:
    """Every policy with the same settings, by name; what one of them does not have, it refuses when it is asked for a plan."""
    return {name: replace(policy, settings=settings) for name, policy in POLICIES.items()}


def importing(layout: str) -> str:
    """The policy that takes the experts of a checkpoint layout (`clada_export.source.mixtures`)."""
    return next(name for name, policy in POLICIES.items() if policy.imports == layout)
