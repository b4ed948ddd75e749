"""The sparsity plan of an imported mixture: the checkpoint says it all, so nothing is calibrated."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any

from clada_export.calibration.choose import AUTO
from clada_export.calibration.cost import relative_bytes
from clada_export.calibration.load_response import LOAD_SLOPE
from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UnsupportedModelError, UsageError
from clada_export.load.signal import LoadSignal
from clada_export.methods.registry import POLICIES, importing
from clada_export.methods.settings import PolicySettings
from clada_export.plan.goal import Goal
from clada_export.plan.layer import LayerPlan, RouterForm
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.record import CalibrationRecord
from clada_export.plan.tensors import LayerTensors
from clada_export.source.mixtures import BLOCK_LAYOUTS, RoutedMLP, import_blocks, routed_mlps

LOAD_MIN, LOAD_MAX = 1.0, 4.0
"""Bounds of m(load). More experts than the checkpoint's k have weight 0, so no load asks for them; fewer are a load below 0."""


def is_imported(decoder: Decoder) -> bool:
    """Whether the model is an imported mixture of experts."""
    return bool(routed_mlps(decoder.module))


def takes_experts(policy: str) -> bool:
    """Whether a policy is about the routed experts of a model; for others they stay as they are, and left dense."""
    known = POLICIES.get(policy)
    return policy == AUTO or (known is not None and known.imports in {layout.name for layout in BLOCK_LAYOUTS})


def check_import(decoder: Decoder, name: str, policy: str, prune: str | None) -> None:
    """Refuse what an imported mixture can't be exported with; any other model passes.

    Args:
        name: the model's, for messages.
        policy: what was asked for, or what a given plan was made by.
        prune: what was asked for.

    Raises:
        UsageError: another policy than the one that imports this layout, or pruning.
    """
    for mixture in routed_mlps(decoder.module).values():
        wanted = importing(mixture.layout)
        if policy not in (wanted, AUTO):
            raise UsageError(
                f"{name} is a mixture of experts already ({mixture.layout}), and policy {policy!r} would choose neurons of a "
                f"dense model; give --policy {wanted}, which takes the checkpoint's own experts and router"
            )
        if prune is not None:
            raise UsageError(
                f"{name} is a mixture of experts already ({mixture.layout}); --prune {prune} is for dense models, leave it out"
            )


def require_dense(decoder: Decoder, name: str, policy: str, prune: str | None) -> tuple[EagerFFN, ...]:
    """The FFNs of a model, at least one.

    Raises:
        UnsupportedModelError: it has none.
        UsageError: it has none but routed experts that another policy takes.
    """
    try:
        return decoder.require_ffns()
    except UnsupportedModelError:
        import_blocks(decoder.module)
        check_import(decoder, name, policy, prune)
        raise


def ignored_options(
    decoder: Decoder, budget: str, default_budget: str, sparsity: float | None, settings: PolicySettings
) -> list[str]:
    """A warning for options that were given and mean nothing to an imported mixture.

    A budget that equals the default can't be told from one that was not given, and is left unsaid.
    """
    if not is_imported(decoder):
        return []
    given = [f"--{field.name}" for field in fields(settings) if getattr(settings, field.name) != field.default]
    given += [] if sparsity is None else ["--sparsity"]
    given += [] if budget == default_budget else ["--budget"]
    if not given:
        return []
    return [f"{', '.join(sorted(given))}: without effect, because the checkpoint's experts and router are taken as they are"]


def import_plan(decoder: Decoder, source: dict[str, Any], record: CalibrationRecord, item: int = 4) -> SparsityPlan:
    """Score external, rule topk, combine weighted: at load 0 the chosen experts run, and the numbers are the model's.

    Args:
        decoder: its FFNs that are no mixture get no plan.
        source: goes into the plan; holds at least `weights_digest`.
        record: of the text and its windows; the plan's own goes on from it.
        item: bytes of one weight in the engine.

    Raises:
        UnsupportedModelError: a mixture that is not among the FFNs, because the op does not have its activation.
    """
    require_whole(decoder, [ffn.name for ffn in decoder.ffns])
    mixtures = routed_mlps(decoder.module)
    chosen = [(ffn, mixtures[ffn.name]) for ffn in decoder.ffns if ffn.name in mixtures]
    layers = tuple(_layer(ffn, mixture) for ffn, mixture in chosen)
    arrays = {ffn.name: LayerTensors(mixture.router) for ffn, mixture in chosen}
    first = chosen[0][1]
    told = {
        "layout": first.layout,
        "experts": sorted({mixture.router.granules for _, mixture in chosen}),
        "chosen": sorted({mixture.router.k for _, mixture in chosen if mixture.router.k is not None}),
    }
    # Weights of zero: the load is 0 on any text, unless the user sets it.
    signal = LoadSignal(surprisal_weight=0.0, entropy_weight=0.0)
    plan = SparsityPlan(importing(first.layout), "external", "topk", layers, signal, source, arrays=arrays)
    record = replace(record, goal=Goal.of_import(), details={"imported": told}, relative_bytes=relative_bytes(plan, item))
    return replace(plan, calibration=record)


def require_whole(decoder: Decoder, rewritten: Collection[str]) -> None:
    """Refuse a graph in which a mixture was left as the plain FFN that it was traced as.

    Args:
        rewritten: names of the FFNs that became the op.

    Raises:
        UnsupportedModelError: names the first that did not.
    """
    left = [name for name in routed_mlps(decoder.module) if name not in rewritten]
    if left:
        raise UnsupportedModelError(
            f"{left[0]}: this mixture of experts was not matched in the exported graph or is not in the plan ({len(left)} in "
            "all), and without its router it would be another model"
        )


def _layer(ffn: EagerFFN, mixture: RoutedMLP) -> LayerPlan:
    router = mixture.router
    assert router.k is not None
    return LayerPlan(
        name=ffn.name,
        activation=ffn.activation,
        gated=ffn.gated,
        hidden_size=ffn.hidden_size,
        intermediate_size=ffn.intermediate_size,
        threshold=(float(router.k),),
        load_slope=LOAD_SLOPE,
        load_min=LOAD_MIN,
        load_max=LOAD_MAX,
        expected_sparsity=1.0 - router.k / router.granules,
        granule=mixture.expert_size,
        combine="weighted",
        router=RouterForm.of(router),
    )
