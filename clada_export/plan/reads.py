"""How many weight bytes an FFN reads for one decoded token: our own count of what the op's kernels read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from clada_export.plan.layer import LayerPlan
from clada_export.plan.weights_form import code_bytes
from graph_passes.op import FORMAT_BITS, SHADOW_BLOCK


def _of_codes(bits: int) -> Callable[[float], float]:
    return lambda item: code_bytes(bits)


SHADOW_BYTES = 0.5 + 4 / SHADOW_BLOCK
"""Bytes of one shadow weight: four bits, and its share of a block's float16 scale and offset."""
WEIGHT_BYTES: Mapping[str, Callable[[float], float]] = {
    "plain": float,
    **{name: _of_codes(bits) for name, bits in FORMAT_BITS.items()},
}
"""Bytes of one weight of w_in or w_out by the op's `weight_format`, from the bytes of one number of the weights' type."""
ROUTER_ITEM = 4
MERGED_ITEM = 4
"""Bytes of one weight of a merged FFN, which is float32 whatever the engine's weights are."""


def dense_bytes(layer: LayerPlan, item: float = 4) -> float:
    """Bytes of a dense FFN's weights: n + 1 rows of d values for each of f neurons.

    Args:
        item: bytes of one weight.
    """
    return float(layer.intermediate_size * _rows(layer) * layer.hidden_size * item)


def read_bytes(
    layer: LayerPlan,
    score: str,
    active: float,
    item: float = 4,
    router_parameters: int = 0,
    weight_format: str = "plain",
) -> float:
    """Bytes read for one token when the share `active` of the layer's neurons runs.

    `gate` reads the gate row of every neuron (a plain FFN's only input row), `exact` all input rows, `shadow` the 4-bit copies
    of all input rows, `prefix` and `external` nothing before they decide; a router reads itself. A merged FFN is read whole;
    its router and the merge of all weights are paid once a segment (the prompt), not for a token, and are left out.
    """
    rows = _rows(layer)
    if layer.merge is not None:
        return layer.width / layer.merge * rows * layer.hidden_size * MERGED_ITEM
    inputs = rows - 1
    scored = {"gate": 1, "exact": inputs}.get(score, 0)
    neuron = (scored + (rows - scored) * active) * layer.hidden_size * WEIGHT_BYTES[weight_format](item)
    if score == "shadow":
        neuron += inputs * layer.hidden_size * SHADOW_BYTES
    return layer.width * neuron + router_parameters * ROUTER_ITEM


def _rows(layer: LayerPlan) -> int:
    return 3 if layer.gated else 2
