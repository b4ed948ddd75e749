"""What becomes a load: numbers of any width, and nothing finite becomes a load that skips."""

from __future__ import annotations

import math

import numpy as np
import pytest

from clada_export.load.values import LARGEST, load_array, one_load


@pytest.mark.parametrize("value", [-(10**400), np.longdouble("-1e4000"), np.longdouble("-1e300"), -1e308, np.float64(-1e39)])
def test_what_is_finite_stays_finite(value: object) -> None:
    """-inf would skip the row."""
    for found in (one_load(value), float(load_array(value, "load")), float(load_array([[value]], "load")[0, 0])):
        assert found == -LARGEST


def test_infinities_and_nan_stay() -> None:
    for kind in (np.float16, np.float32, np.float64, np.longdouble):
        found = load_array(np.array([math.inf, -math.inf, math.nan, 0.5], kind), "load")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.array([math.inf, -math.inf, math.nan, 0.5], np.float32))
