"""Whether the parts of a planned layer fit each other, and the op."""

from __future__ import annotations

from clada_export.plan.layer import LayerPlan, layer_attributes
from graph_passes.op import ContractError, SparseFFNAttributes, weight_shapes


def layer_fault(layer: LayerPlan, score: str, rule: str) -> str | None:
    """What is wrong with a layer that follows the schema: its parts do not fit each other, or the op; None if nothing is.

    Args:
        score, rule: of the plan.
    """
    if layer.load_min > layer.load_max:
        return f"has load_min {layer.load_min} above load_max {layer.load_max}"
    if layer.width > layer.intermediate_size:
        return f"keeps {layer.width} of {layer.intermediate_size} neurons"
    if layer.width % layer.granule:
        return f"has {layer.width} neurons, which granules of {layer.granule} do not divide"
    try:
        attributes = layer_attributes(layer, score, rule)
        weight_shapes(attributes, layer.hidden_size, layer.width)
    except ContractError as error:
        return f"does not fit the op: {error}"
    if layer.merge is not None:
        return _merge_fault(layer, attributes)
    if (layer.router is not None) != (score == "external"):
        found = "there is none" if layer.router is None else f"the score is {score!r}"
        return f"is not sound: score 'external' and a router belong together, and {found}"
    return _router_fault(layer) or _threshold_fault(layer, rule)


def _merge_fault(layer: LayerPlan, attributes: SparseFFNAttributes) -> str | None:
    start = f"merges {layer.merge} experts"
    if layer.router is None or layer.width % (layer.merge or 1):
        return f"{start}: they must divide its {layer.width} neurons, and it must have a router"
    if layer.router.output != "softmax":
        return f"{start}: its router must have output 'softmax', not {layer.router.output!r}"
    if attributes.use_stat or attributes.score == "external" or attributes.rule == "topk":
        return f"{start}: that goes with no prompt statistic, no score 'external' and no rule 'topk'"
    return _router_fault(layer) or _threshold_fault(layer, attributes.rule)


def _router_fault(layer: LayerPlan) -> str | None:
    if layer.router is None:
        return None
    k, output = layer.router.k, layer.router.output
    if output != "topk_softmax":
        return None if k is None else f"has a router with k {k}, and output {output!r} has none"
    if k is None or k > layer.scored:
        return f"has a router with k {k}; output 'topk_softmax' wants 1 to {layer.scored}, the granules"
    return None


def _threshold_fault(layer: LayerPlan, rule: str) -> str | None:
    granules = layer.width // layer.granule
    if rule == "topk":
        if len(layer.threshold) != 1:
            return f"has {len(layer.threshold)} thresholds; rule topk has one, k"
        if not 1 <= layer.threshold[0] <= granules:
            return (
                f"has k = {layer.threshold[0]:g} (the threshold of rule topk); it must be between 1 and {granules}, the number "
                "of granules"
            )
    elif len(layer.threshold) not in (1, granules):
        return f"has {len(layer.threshold)} thresholds; wanted 1 or {granules}, one a granule"
    return None
