"""How the numbers of a report read. Text, not HTML."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any) -> str:
    """Three significant digits; whole numbers in full; `-` for None; anything that is no number as it is."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e6):
        return str(int(value))
    return f"{value:.3g}"


def numbers(value: Any) -> str:
    """A number, or those of a list with commas between."""
    return ", ".join(number(item) for item in value) if isinstance(value, list | tuple) else number(value)


def percent(value: float, digits: int = 1) -> str:
    """A share in percent."""
    return f"{value:.{digits}%}"


def size(count: int) -> str:
    """Bytes in kB or MB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
