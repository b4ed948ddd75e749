"""The inverse of a Hessian, as what errors are made up with: in pruning, and in quantising."""

from __future__ import annotations

import torch
from torch import Tensor

from clada_export.errors import UsageError

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean."""
DAMPING_TRIES = 5


def prepare(h: Tensor) -> tuple[Tensor, Tensor]:
    """Set the diagonal of dead columns (inputs that are always zero) to 1.

    Returns:
        A copy of the Hessian [in, in], and the dead columns, bool [in].
    """
    dead = h.diagonal() == 0
    h = h.clone()
    h.diagonal()[dead] = 1.0
    return h, dead


def upper_factor(h: Tensor, layer: str, dtype: torch.dtype | None = None) -> Tensor:
    """U with H^-1 = U^T U, upper triangular [in, in]: the Cholesky factor of the inverse of the damped Hessian.

    It is taken as the inverse of R, where H = R R^T and R is upper triangular: the same matrix, without forming H^-1. float32
    is tried first, then float64 (unless `dtype` names one), then ten times the damping, and so on.

    Raises:
        UsageError: the Hessian is not positive definite with any damping that was tried; names the layer.
    """
    mean = float(h.diagonal().double().mean())
    damping = DAMPING
    for _ in range(DAMPING_TRIES):
        for kind in (torch.float32, torch.float64) if dtype is None else (dtype,):
            damped = h.to(kind, copy=True)
            damped.diagonal().add_(damping * mean)
            lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if int(info) == 0:
                identity = torch.eye(len(h), dtype=kind, device=h.device)
                factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
                if bool(torch.isfinite(factor).all()):
                    return factor
        damping *= 10
    raise UsageError(
        f"{layer}: the Hessian of its inputs is not positive definite, even with {damping / 10:g} of its mean diagonal added. "
        "Give more calibration text, or another way to prune"
    )
