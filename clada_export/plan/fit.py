"""Whether a plan that a user gave, or that lies in an engine's folder, is for the model at hand: checked before any work."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UnsupportedModelError, UsageError
from clada_export.plan.adapters import adapted_weights, check_adapters
from clada_export.plan.layer import LayerPlan
from clada_export.plan.plan import SparsityPlan


def require_fit(plan: SparsityPlan, ffns: Sequence[EagerFFN], weights_digest: str, origin: str) -> None:
    """Compare every layer of a plan with the FFN that the model has of that name.

    Args:
        ffns: of the model.
        weights_digest: of the model's weights.

    Raises:
        UsageError: the plan is for other weights, a layer is not in the model or is another FFN there; names plan, layer and
            both values.
    """
    made_for = str(plan.source.get("weights_digest"))
    if made_for != weights_digest:
        raise UsageError(
            f"{origin}: the plan was made for other weights (digest {made_for[:16]}...); this model has "
            f"{weights_digest[:16]}..."
        )
    if not plan.layers:
        raise UsageError(f"{origin}: the plan has no layers, so there is nothing to compile")
    known = {ffn.name: ffn for ffn in ffns}
    for layer in plan.layers:
        ffn = known.get(layer.name)
        if ffn is None:
            raise UsageError(f"{origin}: layer {layer.name!r} is not in this model")
        require_same(layer, ffn.activation, ffn.gated, ffn.hidden_size, ffn.intermediate_size, origin)
    check_adapters(ffns, plan.arrays, origin)


def require_finite_weights(plan: SparsityPlan, ffns: Sequence[EagerFFN]) -> None:
    """Check the weights that an engine is made of, as they are now: no calibration has run the model.

    Raises:
        UnsupportedModelError: NaN or infinite; names the layer.
    """
    for ffn in ffns:
        weights = [item.weight for item in adapted_weights(ffn)] if plan.layer(ffn.name) else []
        if not all(bool(torch.isfinite(weight).all()) for weight in weights):
            raise UnsupportedModelError(f"{ffn.name}: a weight is not finite, as it is read or in the engine's type")


def require_same(layer: LayerPlan, activation: str, gated: bool, hidden_size: int, intermediate_size: int, origin: str) -> None:
    """Compare a layer of a plan with what was found in the model or in its graph.

    Raises:
        UsageError: names plan, layer and both values.
    """
    start = f"{origin}: the plan does not fit this model: {layer.name} has"
    if (layer.hidden_size, layer.intermediate_size) != (hidden_size, intermediate_size):
        planned, found = f"{layer.hidden_size} x {layer.intermediate_size}", f"{hidden_size} x {intermediate_size}"
        raise UsageError(f"{start} sizes {planned} in the plan and {found} in the model")
    if layer.activation != activation:
        raise UsageError(f"{start} activation {layer.activation!r} in the plan and {activation!r} in the model")
    if layer.gated != gated:
        raise UsageError(f"{start} gated {layer.gated} in the plan and {gated} in the model")
