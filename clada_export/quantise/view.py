"""The model computed with quantised weights and inputs, without a weight of it being changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clada_export.quantise.codes import Coded
from clada_export.quantise.store import QuantStore
from graph_passes.quant.contract import BLOCK, LEAST_AMAX

NUDGE = 2.0**-17
"""Of a block's largest number: some times what sums differ by that are added up in another order, so that where those round to
another step now and then, these do."""


class QuantisedView:
    """While it is on, every matrix of a store is decoded when its product is computed, and the product's input is rounded.

    That is what `com.clada::QuantMatMul` computes, but for the order of sums. An FFN's hidden activations are rounded where
    they go into the down projection, so after whatever skips neurons before it. Codes are decoded a matrix at a time, for each
    call.

    Args:
        store: of the model whose modules the store's matrices are.
    """

    def __init__(self, store: QuantStore) -> None:
        self.store = store

    @property
    def key(self) -> str:
        """What it computes depends on this beside the model: on the codes, for which all are made."""
        return self.store.digest

    @contextmanager
    def on(self, nudge: torch.Generator | None = None) -> Iterator[None]:
        """The model computes so meanwhile.

        Args:
            nudge: moves inputs by about `NUDGE` of a block's largest number before they are rounded: by what another order of
                sums may move them, so that some fall on the other side of a half.
        """
        modules = {name: self.store.codes.matrices.found[name].module for name in self.store.names}
        before = {name: vars(module).get("forward") for name, module in modules.items()}
        for name, module in modules.items():
            vars(module)["forward"] = _forward(module, partial(self.store.coded, name), nudge)
        try:
            yield
        finally:
            for name, module in modules.items():
                vars(module).pop("forward", None)
                if (forward := before[name]) is not None:
                    vars(module)["forward"] = forward


def round_inputs(x: Tensor, nudge: torch.Generator | None = None) -> Tensor:
    """What the 8-bit numbers stand for that the op makes of its input (docs/quant-matmul-op.md, "x in 8 bits").

    Args:
        x: [.., K], K a multiple of 32.

    Returns:
        float32 [.., K]; a block with a number that is not finite is NaN.
    """
    blocks = x.float().reshape(*x.shape[:-1], -1, BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    live = largest.isfinite() & (largest >= LEAST_AMAX)
    safe = torch.where(live, largest, torch.ones(()))
    # The scale is 0 in a block of zeros and NaN in one that is not finite; so is the product.
    scale = torch.where(live, safe / 127.0, torch.where(largest.isfinite(), 0.0, torch.nan))
    if nudge is not None:
        blocks = blocks + (NUDGE * safe) * torch.randn(blocks.shape, generator=nudge)
    q = torch.where(live, blocks, torch.zeros(())).mul_(127.0 / safe).round_()
    return q.mul_(scale).reshape(x.shape)


def _forward(module: nn.Module, coded: Callable[[], Coded], nudge: torch.Generator | None) -> Callable[..., Tensor]:
    # As the class computes it, with another weight: some scale what they look up, or keep their matrix transposed.
    compute: Callable[..., Tensor] = type(module).forward

    def look_up(ids: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """With the rows that are wanted, as a whole table would be large."""
        tokens, places = torch.unique(ids, return_inverse=True)
        rows = coded().of_rows(lambda values: values[tokens]).decoded()
        padding = getattr(module, "padding_idx", None)
        if padding is not None and padding >= len(rows):
            rows = nn.functional.pad(rows, (0, 0, 0, padding + 1 - len(rows)))
        with _weight(module, rows):
            return compute(module, places, *arguments, **named)

    def multiply(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        rows = coded().decoded()
        with _weight(module, rows if isinstance(module, nn.Linear) else rows.t()):
            return compute(module, round_inputs(x, nudge), *arguments, **named)

    return look_up if isinstance(module, nn.Embedding) else multiply


@contextmanager
def _weight(module: nn.Module, weight: Tensor) -> Iterator[None]:
    """The module has another weight meanwhile."""
    parameters = module._parameters
    before = parameters["weight"]
    parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        parameters["weight"] = before
