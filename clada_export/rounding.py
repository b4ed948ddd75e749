"""Round FFN weights to the type that the engine stores them in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clada_export.ffn import EagerFFN

TORCH_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def round_ffn_weights(ffns: Sequence[EagerFFN], dtype: str) -> str:
    """Round the weights of the FFNs' projections in place, so that calibration and parity see what the engine runs.

    Biases stay as they are: the engine keeps them in float32.

    Args:
        dtype: `float16` or `bfloat16`.

    Returns:
        A sentence for the manifest: the type, and the largest relative change of a layer's weights.
    """
    worst = 0.0
    with torch.no_grad():
        for ffn in ffns:
            for module in (*ffn.inputs, ffn.down):
                weight = module.weight
                assert isinstance(weight, torch.Tensor)
                rounded = weight.to(TORCH_TYPES[dtype]).to(weight.dtype)
                change = float((rounded - weight).norm() / weight.norm().clamp(min=1e-30))
                worst = max(worst, change)
                weight.copy_(rounded)
    return (
        f"FFN weights are stored as {dtype} (largest relative change of a matrix: {worst:.2g}); "
        "parity is against the model with these weights"
    )
