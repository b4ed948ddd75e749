"""SparseGPT (arXiv 2301.00774): remove weights by their optimal brain surgeon saliency, and let the others make up for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clada_export.methods.prune_spec import PruneSpec
from clada_export.methods.static.inverse import prepare, upper_factor
from clada_export.methods.static.masks import all_but_highest, lowest
from clada_export.methods.static.statistics import hessian, require_finite

BLOCK = 128
"""Columns whose mask is chosen together (unstructured), and whose updates of later columns are applied together."""


def pruner(x: Tensor, spec: PruneSpec, layer: str) -> Callable[[Tensor], Tensor]:
    """What prunes a weight [out, in] whose input rows are x [rows, in]; it returns a new float32 weight.

    The Hessian is factorised here, once for all weights that share these inputs.

    Raises:
        UsageError: see `upper_factor`.
    """
    h = hessian(x)
    require_finite(h, layer)
    h, dead = prepare(h)
    factor = upper_factor(h, layer).float()
    del h
    return lambda weight: prune_weight(weight, factor, dead, spec)


def prune_weight(weight: Tensor, factor: Tensor, dead: Tensor, spec: PruneSpec) -> Tensor:
    """Algorithm 1 of the paper, without quantisation.

    Columns are visited from left to right. The saliency of a weight is w_ij^2 / U_jj^2, with w as updated so far. Unstructured:
    the lowest ones of each block of 128 columns, over all rows. n:m: all but n of every m columns, row by row. Then
    e = (w_j - q_j) / U_jj, with q the pruned column, and w_k -= e U_jk for every k >= j.

    Args:
        weight: [out, in].
        factor: U [in, in].
        dead: bool [in]; these columns become zero.

    Returns:
        float32 [out, in]. Zeros are exact: the count of each block is `spec.removed` of its size, or more with dead columns.
    """
    # A column is contiguous in the transposed weight, and every step changes whole columns.
    w = weight.float().t().contiguous().clone()
    w[dead] = 0.0
    group = spec.group
    width = BLOCK if group is None else max(group[1], BLOCK // group[1] * group[1])
    for start in range(0, len(w), width):
        block, u = w[start : start + width], factor[start : start + width, start : start + width]
        errors = torch.empty_like(block)
        scale = u.diagonal().square().unsqueeze(1)
        mask = torch.zeros_like(block, dtype=torch.bool)
        if group is None:
            mask = lowest(block.square() / scale, spec.removed(block.numel()))
        for column in range(len(block)):
            past = errors[:column]
            if group is not None and column % group[1] == 0:
                end = column + group[1]
                now = block[column:end] - u[:column, column:end].t() @ past
                mask[column:end] = all_but_highest((now.square() / scale[column:end]).t(), *group).t()
            value = block[column] - u[:column, column] @ past
            errors[column] = torch.where(mask[column], value / u[column, column], 0.0)
            block[column] = value.masked_fill(mask[column], 0.0)
        w[start + width :].addmm_(factor[start : start + width, start + width :].t(), errors, alpha=-1)
    return w.t().contiguous()


def remove_columns(weight: Tensor, h: Tensor, count: int, layer: str) -> tuple[Tensor, Tensor]:
    """Remove whole columns of a weight, one after the other, the others making up for each.

    The optimal brain surgeon with a column as the unit (the structured form is our own derivation, from Eq. 3 of the paper):
    removing column p costs ||w_p||^2 / [H^-1]_pp, the remaining columns become W - w_p [H^-1]_p: / [H^-1]_pp, and H^-1 loses
    [H^-1]_:p [H^-1]_p: / [H^-1]_pp. The cheapest column goes first, and costs are exact at every step; only the updates of the
    large matrices are put off and done for 128 columns at once.

    Args:
        weight: [out, in].
        h: the Hessian of its inputs [in, in].
        count: columns to remove, below `in`.

    Returns:
        The removed columns, bool [in], and the new weight, float32 [out, in]; the removed columns are zero.

    Raises:
        UsageError: see `upper_factor`.
    """
    h, dead = prepare(h)
    # A column with large activations has an entry in H^-1 far below the others; in float32 it would be rounding noise.
    factor = upper_factor(h, layer, torch.float64)
    inverse = factor.t() @ factor
    del factor
    w = weight.double().clone()
    w[:, dead] = 0.0
    removed = torch.zeros(len(h), dtype=torch.bool, device=h.device)
    while count > 0:
        steps = min(count, BLOCK)
        rows, errors = w.new_zeros(steps, len(h)), w.new_zeros(steps, len(w))
        pivot, size = inverse.diagonal().clone(), w.square().sum(0)
        for step in range(steps):
            place = int((size / pivot).masked_fill(removed, torch.inf).argmin())
            past = rows[:step, place]
            root = pivot[place].sqrt()
            row = (inverse[place] - past @ rows[:step]) / root
            error = (w[:, place] - past @ errors[:step]) / root
            size += row.square() * error.square().sum() - 2 * row * (error @ w - (errors[:step] @ error) @ rows[:step])
            pivot -= row.square()
            rows[step], errors[step] = row, error
            removed[place] = True
            size[removed] = pivot[removed] = 1.0
        w.addmm_(errors.t(), rows, alpha=-1)
        w[:, removed] = 0.0
        inverse.addmm_(rows.t(), rows, alpha=-1)
        count -= steps
    return removed, w.float()


def remove_neurons(
    inputs: Sequence[Tensor], down: Tensor, x: Tensor, h: Tensor, count: int, layer: str
) -> tuple[Tensor, Tensor]:
    """Remove `count` neurons: columns of the down projection, with the Hessian of its inputs h [rows, f].

    Returns:
        The removed neurons, bool [f], and the down projection [d, f] of the others, float32.

    Raises:
        UsageError: see `upper_factor`.
    """
    matrix = hessian(h)
    require_finite(matrix, layer)
    return remove_columns(down, matrix, count, layer)
