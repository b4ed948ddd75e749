"""In which precision the eager model's matrix products are computed while calibration measures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def has_fast_products() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere products of rounded numbers are no faster."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@contextmanager
def products(fast: bool) -> Iterator[None]:
    """Compute float32 matrix products in float32, or (`fast`) round their operands to bfloat16 and sum in float32.

    What was set before is set again afterwards.
    """
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16" if fast else "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before
