"""Round weights to the type that the engine stores them in, and make a model in that type."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UnsupportedModelError

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


def round_all_weights(model: nn.Module, dtype: str) -> str:
    """Round every parameter in place, for engines that compute in `dtype` throughout.

    So are buffers of a single number, such as the scale of Gemma's embeddings, which models use in the type of their weights:
    the square root of 640 is 25.25 in bfloat16, and Gemma was trained with that. Other buffers (rotary frequencies) stay.

    Returns:
        A sentence for the manifest: the type, and the largest relative change of a parameter.

    Raises:
        UnsupportedModelError: a weight is too large for the type; names it.
    """
    worst = 0.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            rounded = weight.to(TORCH_TYPES[dtype]).to(weight.dtype)
            if not bool(torch.isfinite(rounded).all()) and bool(torch.isfinite(weight).all()):
                raise UnsupportedModelError(f"{name}: a weight of {float(weight.abs().max()):.3g} does not fit {dtype}")
            worst = max(worst, float((rounded - weight).norm() / weight.norm().clamp(min=1e-30)))
            weight.copy_(rounded)
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.numel() == 1:
                buffer.copy_(buffer.to(TORCH_TYPES[dtype]))
    return (
        f"the model is stored and computed in {dtype} (largest relative change of a parameter: {worst:.2g}); "
        "parity is against the float32 model with these weights"
    )


def in_dtype(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """A copy whose parameters have another type. Buffers (rotary frequencies) keep theirs: rounded angles lose their place.

    Args:
        dtype: `float16` or `bfloat16`.
    """
    # deepcopy takes what is in `memo` as copied already, so the parameters are never copied in float32, and ties stay ties.
    memo = {
        id(weight): nn.Parameter(weight.detach().to(TORCH_TYPES[dtype]), requires_grad=False) for weight in model.parameters()
    }
    made = copy.deepcopy(model, memo)
    made.config.dtype = TORCH_TYPES[dtype]
    return made
