"""Weight bytes that an engine reads for one decoded token, counted from its manifest and the share of neurons that ran."""

from __future__ import annotations

from clada_export.artifact.manifest import Manifest
from clada_export.plan.layer import LayerPlan
from clada_export.plan.reads import read_bytes
from clada_export.plan.weights_form import code_bytes

_DENSE_SCORE = "exact"
"""A dense step reads every row and needs no other score."""
_ITEM_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}


def ffn_bytes(manifest: Manifest, active_share: float) -> float | None:
    """Of the sparse FFNs, with the same share of neurons in all of them; None where a router is read too, whose size the
    manifest does not say."""
    layers = [LayerPlan.from_dict(layer) for layer in manifest.plan["layers"]]
    if any(layer.router is not None for layer in layers):
        return None
    bits = manifest.weights.get("ffn", {}).get("bits")
    item = _ITEM_BYTES[manifest.dtype] if bits is None else code_bytes(bits)
    score = _DENSE_SCORE if active_share >= 1 else manifest.plan["score"]
    return sum(read_bytes(layer, score, active_share, item) * manifest.ffn_runs.get(layer.name, 1) for layer in layers)


def weight_bytes(manifest: Manifest, active_share: float) -> float | None:
    """Of FFNs, attention and head together; a token's row of the embedding table is not counted. None where the manifest does
    not say how large the others are: that of quantised engines does."""
    ffns = ffn_bytes(manifest, active_share)
    if ffns is None or not manifest.weights:
        return None
    others = [float(manifest.weights[kind]["bytes"]) for kind in ("attention", "head") if kind in manifest.weights]
    return ffns + sum(others)
