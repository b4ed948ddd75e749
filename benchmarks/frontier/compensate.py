"""Rounding that makes up for its own errors (GPTQ, arXiv 2210.17323), with scales that are fixed before."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.frontier.grids import Grid
from clada_export.methods.static.inverse import prepare, upper_factor
from clada_export.methods.static.statistics import hessian

BLOCK = 128
"""Inputs whose errors reach the later ones together."""


def compensated(weights: Tensor, scale: Tensor, low: Tensor, inputs: Tensor, top: int, layer: str) -> Tensor:
    """Codes, uint8 [in, out], of weights given as [in, out]: one row an input.

    Inputs are visited in their order. Each one's weights are rounded, and the error is taken to the weights of the inputs that
    are still to come, so that the product with `inputs` changes the least.

    Args:
        scale, low: of every weight, [in, out] or what broadcasts to it.
        inputs: rows [n, in] that the weights will be multiplied with.
        top: the largest code.
        layer: for messages.

    Raises:
        UsageError: the inputs have no Hessian that can be factorised.
    """
    matrix, dead = prepare(hessian(inputs))
    factor = upper_factor(matrix, layer).float()
    del matrix
    w = weights.float().clone()
    w[dead] = 0.0
    scale, low = scale.expand_as(w), low.expand_as(w)
    safe = torch.where(scale == 0, 1.0, scale)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for start in range(0, len(w), BLOCK):
        block, u = w[start : start + BLOCK], factor[start : start + BLOCK, start : start + BLOCK]
        errors = torch.empty_like(block)
        for row in range(len(block)):
            place = start + row
            value = block[row] - u[:row, row] @ errors[:row]
            code = ((value - low[place]) / safe[place]).round_().clamp_(0, top)
            codes[place] = code.to(torch.uint8)
            errors[row] = (value - low[place] - code * scale[place]) / u[row, row]
        w[start + BLOCK :].addmm_(factor[start : start + BLOCK, start + BLOCK :].t(), errors, alpha=-1)
    return codes


def codes_of(grid: Grid, weights: Tensor, scale: Tensor, low: Tensor, inputs: Tensor, layer: str, down: bool) -> Tensor:
    """Codes, uint8, of neuron-major weights [f, d] (as they are stored) under a grid's scales [f, d / block].

    Args:
        inputs: rows [n, d] of x, or [n, f] of h for the down projection.
    """
    wide = [part.repeat_interleave(grid.block, 1) for part in (scale, low)]
    top = (1 << grid.bits) - 1
    if down:
        return compensated(weights, wide[0], wide[1], inputs, top, layer)
    turned = compensated(weights.t(), wide[0].t(), wide[1].t(), inputs, top, layer)
    return turned.t().contiguous()
