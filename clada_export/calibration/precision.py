"""In which precision the eager model's matrix products are computed while calibration measures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def has_fast_products() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere products of rounded numbers are no faster."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


@contextmanager
def products(fast: bool) -> Iterator[None]:
    """Compute float32 matrix products in float32, or (`fast`) round their operands to bfloat16 and sum in float32.

    What was set before is set again afterwards.
    """
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16" if fast else "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before
