"""What routers share whose experts' outputs are weighted or counted by a number k of them."""

from __future__ import annotations

from clada_export.errors import UsageError
from clada_export.methods.training.layer import ExpertLayer


def require_k(layer: ExpertLayer, k: int) -> None:
    """Refuse a number of experts to run that is not 1..E.

    Raises:
        UsageError: says how many experts there are.
    """
    if not 1 <= k <= layer.experts:
        raise UsageError(f"{layer.name}: {k} experts to run of {layer.experts}; choose 1 to {layer.experts}")
