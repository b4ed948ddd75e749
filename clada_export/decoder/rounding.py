"""Round weights to the type that the engine stores them in, and make a model in that type."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from clada_export.decoder.digest import pieces
from clada_export.decoder.ffn import EagerFFN
from clada_export.decoder.spool import Spool, room
from clada_export.errors import UnsupportedModelError

TORCH_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def round_ffn_weights(ffns: Sequence[EagerFFN], dtype: str, used: Callable[[Tensor], None] = lambda weight: None) -> str:
    """Round the weights of the FFNs' projections in place, so that calibration and parity see what the engine runs.

    Biases stay as they are: the engine keeps them in float32.

    Args:
        dtype: `float16` or `bfloat16`.
        used: told of each weight that was rounded.

    Returns:
        A sentence for the manifest: the type, and the largest relative change of a layer's weights.
    """
    worst = 0.0
    for ffn in ffns:
        for module in (*ffn.inputs, ffn.down):
            assert isinstance(module.weight, Tensor)
            worst = max(worst, _round(module.weight, dtype))
            used(module.weight)
    return (
        f"FFN weights are stored as {dtype} (largest relative change of a matrix: {worst:.2g}); "
        "parity is against the model with these weights"
    )


def round_all_weights(model: nn.Module, dtype: str, used: Callable[[Tensor], None] = lambda weight: None) -> str:
    """Round every parameter in place, for engines that compute in `dtype` throughout.

    So are buffers of a single number, such as the scale of Gemma's embeddings, which models use in the type of their weights:
    the square root of 640 is 25.25 in bfloat16, and Gemma was trained with that. Other buffers (rotary frequencies) stay.

    Args:
        dtype: `float16` or `bfloat16`.
        used: told of each parameter that was rounded.

    Returns:
        A sentence for the manifest: the type, and the largest relative change of a parameter.

    Raises:
        UnsupportedModelError: a weight is too large for the type; names it.
    """
    worst = 0.0
    for name, weight in model.named_parameters():
        worst = max(worst, _round(weight, dtype, name))
        used(weight)
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.numel() == 1:
                buffer.copy_(buffer.to(TORCH_TYPES[dtype]))
    return (
        f"the model is stored and computed in {dtype} (largest relative change of a parameter: {worst:.2g}); "
        "parity is against the float32 model with these weights"
    )


def _round(weight: Tensor, dtype: str, name: str | None = None) -> float:
    """Round a weight in place, a piece at a time.

    Args:
        name: of one that has to stay finite.

    Returns:
        The norm of what changed, relative to its own.

    Raises:
        UnsupportedModelError: it has a number that is too large for the type.
    """
    changed = whole = 0.0
    with torch.no_grad():
        for piece in pieces(weight):
            rounded = piece.to(TORCH_TYPES[dtype]).to(weight.dtype)
            if name is not None and not bool(torch.isfinite(rounded).all()) and bool(torch.isfinite(piece).all()):
                raise UnsupportedModelError(f"{name}: a weight of {float(piece.abs().max()):.3g} does not fit {dtype}")
            changed += float((rounded - piece).norm()) ** 2
            whole += float(piece.norm()) ** 2
            piece.copy_(rounded)
    return float(changed**0.5 / max(whole**0.5, 1e-30))


def in_dtype(model: PreTrainedModel, dtype: str, spool: Spool | None = None) -> PreTrainedModel:
    """A copy whose parameters have another type. Buffers (rotary frequencies) keep theirs: rounded angles lose their place.

    Args:
        dtype: `float16` or `bfloat16`.
        spool: gets the parameters; None leaves them in memory.

    Raises:
        UsageError: the spool has no room for them.
    """
    wanted = TORCH_TYPES[dtype]
    weights = list(model.parameters())
    if spool is not None:
        spool.reserve(room((weight.numel(), wanted.itemsize) for weight in weights))
    # deepcopy takes what is in `memo` as copied already, so the parameters are never copied in float32, and ties stay ties.
    memo = {}
    for weight in weights:
        if spool is None:
            values = weight.detach().to(wanted)
        else:
            values = spool.copy(weight.detach(), wanted)
            spool.used(values)
        memo[id(weight)] = nn.Parameter(values, requires_grad=False)
    made = copy.deepcopy(model, memo)
    made.config.dtype = wanted
    return made
