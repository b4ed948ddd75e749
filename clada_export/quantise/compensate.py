"""Rounding that makes up for its own errors (GPTQ, arXiv 2210.17323): all matrices of a model in one pass over some text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clada_export.decoder.decoder import Decoder
from clada_export.errors import UnsupportedModelError
from clada_export.methods.static.inverse import prepare, upper_factor
from clada_export.methods.static.statistics import hessian, require_finite
from clada_export.quantise.store import QuantStore
from clada_export.quantise.view import QuantisedView
from graph_passes.quant.contract import BLOCK
from graph_passes.quant.layout import QuantisedMatrix
from graph_passes.quant.op import ContractError
from graph_passes.quant.quantise import quantise

TOGETHER = 128
"""Columns whose errors reach the later ones together."""
TOKENS = 8192
"""Of text that a pass takes at most: all of it goes through a layer at once."""
MOST_BITS = 6
"""Of codes whose errors are worth making up for; with 8 bits rounding costs less than what measures it."""


def compensate(
    decoder: Decoder, store: QuantStore, windows: Tensor, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Make the codes of a store so that the model's products change little on a text, and keep them in it.

    The text goes through the model once. When it comes to a product, the matrix is quantised by the inputs that are there, and
    the product is computed with what came out: later matrices make up for what is left of the errors of earlier ones, too.
    Matrices of more than `MOST_BITS` bits, tables of tokens, and what the pass never comes to are left to the store, where they
    get the nearest codes.

    Args:
        store: whose codes are not made yet. Its view is on during the pass.
        windows: int64 [N, context].
        progress: called with (matrices done, matrices in all).

    Raises:
        UnsupportedModelError: a weight that is not finite; names it.
        UsageError: activations that are not finite, or whose Hessian can't be factorised; names the matrix.
    """
    work = _Pass(store, progress)
    text = windows[: max(1, TOKENS // windows.shape[1])]
    with ExitStack() as held:
        held.enter_context(torch.no_grad())
        held.enter_context(decoder.frozen())
        held.enter_context(QuantisedView(store).on())
        for name in store.names:
            module = store.codes.matrices.found[name].module
            if not isinstance(module, nn.Embedding):
                handle = module.register_forward_pre_hook(work.hook(name))
                held.callback(handle.remove)
        with suppress(_LastMatrixError):  # nothing is wanted of what follows
            decoder.run_whole(text)


class _LastMatrixError(Exception):
    """The last matrix has its codes: ends a pass. It never leaves this module."""


@dataclass
class _Inputs:
    """What a product was called with, and what was made of it: neighbouring products often have one input."""

    x: Tensor
    factor: Tensor


class _Pass:
    """Quantises the matrices as the pass comes to them."""

    def __init__(self, store: QuantStore, progress: Callable[[int, int], None]) -> None:
        self.store, self.progress = store, progress
        self.waiting = [name for name in store.names if not isinstance(self._module(name), nn.Embedding)]
        self.total = len(self.waiting)
        self.inputs: _Inputs | None = None

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A forward pre-hook that makes the codes of a matrix before its first product."""

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if name not in self.waiting:
                return
            self.waiting.remove(name)
            if self.store.coded_bits(name) <= MOST_BITS:
                self._quantise(name, arguments[0])
            self.progress(self.total - len(self.waiting), self.total)
            if not self.waiting:
                raise _LastMatrixError

        return before

    def _module(self, name: str) -> nn.Module:
        return self.store.codes.matrices.found[name].module

    def _quantise(self, name: str, x: Tensor) -> None:
        if self.inputs is None or self.inputs.x is not x:
            self.inputs = _Inputs(x, inverse_factor(x.reshape(-1, x.shape[-1]), name))
        matrix = self.store.codes.matrices.found[name]
        try:
            made = compensated(matrix.rows(), self.inputs.factor, self.store.coded_bits(name), torch.get_num_threads())
        except ContractError as error:
            raise UnsupportedModelError(f"{name}: {error}") from error
        self.store.codes.keep(name, made)


def inverse_factor(x: Tensor, name: str) -> Tensor:
    """U with H^-1 = U^T U, upper triangular float32 [in, in], of the inputs x [rows, in] (see `upper_factor`).

    An input that is always 0 gets an error of its own, which no other makes up for.

    Raises:
        UsageError: see `compensate`.
    """
    matrix = hessian(x)
    require_finite(matrix, name)
    matrix, _ = prepare(matrix)
    return upper_factor(matrix, name).float()


def compensated(weight: Tensor, factor: Tensor, bits: int, threads: int = 1) -> QuantisedMatrix:
    """Quantise a matrix, symmetric.

    Columns are visited in their order. Each is rounded, and its error is taken to the columns that are still to come, so that
    the product with the inputs changes the least. The scales of a block are searched for when it is reached, for its weights as
    they are by then. A weight counts there by 1 / U_kk^2, which is what an error of it costs when all later ones make up for it
    (arXiv 2210.17323, Eq. 2; the paper's groups do the same without weighing).

    Args:
        weight: float32 [N, K], K a multiple of 32.
        factor: of the inputs, [K, K].
        threads: that search for scales.

    Raises:
        ContractError: a weight that is not finite, or a shape that blocks do not divide.
    """
    if not bool(torch.isfinite(weight).all()):
        quantise(weight.numpy(), bits)  # says where
    zero = 1 << (bits - 1)
    # A column is contiguous in the transposed weight, and every step changes whole columns.
    w = weight.t().contiguous().clone()
    codes = torch.empty(w.shape, dtype=torch.uint8)
    scales = np.empty((w.shape[1], len(w) // BLOCK), np.float16)
    for start in range(0, len(w), TOGETHER):
        columns, u = w[start : start + TOGETHER], factor[start : start + TOGETHER, start : start + TOGETHER]
        errors = torch.empty_like(columns)
        # Errors reach a block's own columns one by one, its neighbours' when it is done, and all later ones when these are.
        for first in range(0, len(columns), BLOCK):
            last = first + BLOCK
            block, own = columns[first:last], u[first:last, first:last]
            cost = own.diagonal().square().reciprocal().numpy()
            chosen = quantise(block.t().contiguous().numpy(), bits, search=True, importance=cost, threads=threads).scale
            scales[:, (start + first) // BLOCK] = chosen[:, 0]
            scale = torch.from_numpy(chosen[:, 0].astype(np.float32))
            inverse = torch.where(scale.abs() > 1e-30, scale.reciprocal(), 0.0)
            made = errors[first:last]
            for row in range(BLOCK):
                value = block[row] - own[:row, row] @ made[:row]
                q = (value * inverse).round_().clamp_(-zero, zero - 1)
                made[row] = (value - q * scale) / own[row, row]
                codes[start + first + row] = (q + zero).to(torch.uint8)
            columns[last:].addmm_(u[first:last, last:].t(), made, alpha=-1)
        w[start + TOGETHER :].addmm_(factor[start : start + TOGETHER, start + TOGETHER :].t(), errors, alpha=-1)
    return QuantisedMatrix(codes.t().contiguous().numpy(), scales, bits)
