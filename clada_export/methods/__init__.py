"""The methods: one file or folder each, which holds its policy, its trainer and what it imports.

`common` is what policies are made of, `training` what trains routers, `registry` lists the policies by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["POLICIES", "MethodPolicy", "PolicyContext", "PolicySettings", "all_policies", "get_policy"]

if TYPE_CHECKING:
    from clada_export.calibration.context import PolicyContext
    from clada_export.methods.common.policy import MethodPolicy
    from clada_export.methods.registry import POLICIES, all_policies, get_policy
    from clada_export.methods.settings import PolicySettings

_HOMES = {
    "POLICIES": "clada_export.methods.registry",
    "MethodPolicy": "clada_export.methods.common.policy",
    "PolicyContext": "clada_export.calibration.context",
    "PolicySettings": "clada_export.methods.settings",
    "all_policies": "clada_export.methods.registry",
    "get_policy": "clada_export.methods.registry",
}


def __getattr__(name: str) -> Any:
    # The registry imports every policy, and each of them this folder.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
