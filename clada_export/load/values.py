"""What callers give as a load becomes the float32 numbers that the graph takes.

-inf means that a row is not computed at all, so no number may become it by overflow: what is finite stays finite.
"""

from __future__ import annotations

import math
import sys
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from clada_export.errors import UsageError, shown

Array: TypeAlias = npt.NDArray[np.float64]

DENSE = math.inf
SKIP = -math.inf

LARGEST = float(np.finfo(np.float32).max)
"""Of loads and of the numbers that make them: they are float32 in the end."""


def in_float32(loads: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """Loads as float32, in which what is finite stays finite: -inf would mean that nothing is computed.

    NaN stays NaN.

    Args:
        loads: of any width; one type of NumPy holds more than float64 does.
    """
    if (np.abs(loads) <= LARGEST).all():
        return loads.astype(np.float32)
    bounded = np.where(np.isfinite(loads), np.clip(loads, -LARGEST, LARGEST), loads)
    return bounded.astype(np.float32)


def one_load(load: Any) -> float:
    """A load that holds for every token: `dense`, or a number, within float32.

    Raises:
        UsageError: it is something else, or NaN, or -inf.
    """
    if isinstance(load, str) and load == "dense":
        return DENSE
    value = _number(load)
    if value is None:
        raise UsageError(f"load is {shown(load)}; it must be 'auto', 'dense', a number of standard deviations or a function")
    if math.isnan(value) or value == SKIP:
        raise UsageError(f"load is {value}; it must be a number, or +inf for dense")
    return float(in_float32(np.array(value)))


def load_array(loads: Any, what: str) -> npt.NDArray[np.float32]:
    """One load, or an array of them; NaN stays NaN.

    Args:
        what: where they come from, for the message.

    Raises:
        UsageError: not numbers.
    """
    try:
        values = np.asarray(loads)
    except (ValueError, OverflowError) as error:  # rows of several lengths
        raise UsageError(f"{what} is no array of numbers: {shown(loads)}") from error
    if values.dtype == object:  # integers beyond 64 bits, or anything
        numbers = [_number(item) for item in values.ravel()]
        if None in numbers:
            raise UsageError(f"{what} is no array of numbers: {shown(loads)}")
        values = np.array(numbers, np.float64).reshape(values.shape)
    if values.dtype.kind not in "iuf":
        raise UsageError(f"{what} is {values.dtype}; numbers are wanted, or +inf for dense")
    return in_float32(values if values.dtype == np.longdouble else values.astype(np.float64))


def _number(value: Any) -> float | None:
    """A real number as a float; None if it is none. A finite one that no float holds is as large as a float can be."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        return None
    try:
        found = float(value)
    except OverflowError:
        found = math.inf if value > 0 else -math.inf
    wide = isinstance(value, int) or bool(np.isfinite(value))
    return math.copysign(sys.float_info.max, found) if wide and math.isinf(found) else found
