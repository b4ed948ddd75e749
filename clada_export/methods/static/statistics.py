"""What the methods read from the calibration rows x [rows, in] of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from clada_export.errors import UsageError

_ROWS = 2048


def require_finite(values: Tensor, layer: str) -> None:
    """Check activations or what was made of them.

    Raises:
        UsageError: NaN or infinite; names the layer.
    """
    if not bool(torch.isfinite(values).all()):
        raise UsageError(f"{layer}: the activations are not finite on the calibration text, so it can't be pruned")


def column_norms(x: Tensor) -> Tensor:
    """||X_j||_2 over all rows, float32 [in] (Wanda, arXiv 2306.11695, Eq. 1)."""
    norms: Tensor = torch.linalg.vector_norm(x.float(), dim=0)
    return norms


def hessian(x: Tensor) -> Tensor:
    """H = 2/N X^T X, float32 [in, in], of the layer-wise problem min ||X W^T - X V^T||^2 (SparseGPT, arXiv 2301.00774)."""
    total = x.new_zeros((x.shape[1], x.shape[1]), dtype=torch.float32)
    for part in torch.split(x, _ROWS):
        total.addmm_(part.float().t(), part.float())
    return total.mul_(2.0 / max(len(x), 1))


def relative_error(before: Tensor, after: Tensor) -> float:
    """||after - before|| / ||before||; 0 where both are zero, infinite where only `before` is."""
    error, size = float((after - before).norm()), float(before.norm())
    return error / size if size > 0 else (0.0 if error == 0 else float("inf"))


def product_error(x: Tensor, before: Tensor, after: Tensor) -> float:
    """||X (W' - W)^T|| / ||X W^T|| of two weights [out, in], without the bias."""
    error = size = 0.0
    change = after - before
    for part in torch.split(x, _ROWS):
        error += float((part @ change.t()).double().square().sum())
        size += float((part @ before.t()).double().square().sum())
    return (error / size) ** 0.5 if size > 0 else (0.0 if error == 0 else float("inf"))
