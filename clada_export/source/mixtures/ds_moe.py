"""The layout of DS-MoE (dense training, sparse inference, arXiv 2404.05567) as transformers has it: a router, stacked experts.

    logits = router.weight x
    scores = softmax over the top_k largest logits
    y = sum over the chosen experts of score_e * down_e(act(gate_e x) * up_e x)

GraniteMoe has it. Blocks are found by their structure, not by the model's name, and one is taken only if, on random inputs, its
mixture gives what the block itself gives: how a block gates can't be seen in its attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clada_export.source.mixtures.routed_mlp import RoutedMLP
from graph_passes.router import Router

LAYOUT = "DS-MoE"

PROBE_ROWS = 32
PROBE_TOLERANCE = 1e-3
"""Of the probe's largest output: float32 rounding is far below, another way to gate far above."""


def import_blocks(model: nn.Module, settle: Callable[[nn.Module], None] = lambda module: None) -> tuple[str, ...]:
    """Replace every block of this layout by a `RoutedMLP`, in place.

    Args:
        settle: called with each `RoutedMLP`, to move its weights, before the next is made.

    Returns:
        The blocks' paths. Blocks that are built or gated in another way stay as they are.
    """
    replaced = []
    for path, block in list(model.named_modules()):
        mixture = _mixture(block)
        if mixture is not None and path and _same(block, mixture):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, mixture)
            settle(mixture)
            replaced.append(path)
    config: Any = getattr(model, "config", None)
    if replaced and getattr(config, "output_router_logits", False):
        # They are recorded in a block that is no longer there.
        config.output_router_logits = False
    return tuple(replaced)


def _mixture(block: nn.Module) -> RoutedMLP | None:
    """The mixture that the block's weights make, or None if they are not those of this layout."""
    router, experts = getattr(block, "router", None), getattr(block, "experts", None)
    if not isinstance(router, nn.Module) or not isinstance(experts, nn.Module):
        return None
    weight, k = getattr(router, "weight", None), getattr(router, "top_k", None)
    inputs, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    act_fn = getattr(experts, "act_fn", None)
    tensors = (weight, inputs, down)
    if not all(isinstance(tensor, Tensor) for tensor in tensors) or not isinstance(k, int) or not callable(act_fn):
        return None
    assert isinstance(weight, Tensor) and isinstance(inputs, Tensor) and isinstance(down, Tensor)
    # Biases, shared experts and whatever else has weights would be left out.
    if {id(parameter) for parameter in block.parameters()} != {id(tensor) for tensor in tensors}:
        return None
    if weight.dim() != 2 or inputs.dim() != 3 or down.dim() != 3:
        return None
    experts_count, width = weight.shape
    size = down.shape[2]
    if inputs.shape != (experts_count, 2 * size, width) or down.shape[:2] != (experts_count, width):
        return None
    if not 1 <= k <= experts_count:
        return None
    gate, up = inputs.detach().chunk(2, dim=1)
    return RoutedMLP(
        gate.reshape(-1, width),
        up.reshape(-1, width),
        down.detach().permute(1, 0, 2).reshape(width, -1),
        act_fn,
        Router(
            (weight.detach().float().numpy(),), (None,), output="topk_softmax", k=k, dense_rows="scores"
        ),
        LAYOUT,
    )  # fmt: skip


def _same(block: nn.Module, mixture: RoutedMLP) -> bool:
    width = mixture.router.hidden_size
    x = torch.randn(1, PROBE_ROWS, width, generator=torch.Generator().manual_seed(0))
    x = x.to(mixture.gate_proj.weight.dtype)
    with torch.inference_mode():
        try:
            wanted = block(x)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return False
        if not isinstance(wanted, Tensor) or wanted.shape != x.shape:
            return False
        difference = (mixture(x) - wanted).abs().max()
        return bool(difference <= PROBE_TOLERANCE * wanted.abs().max())
