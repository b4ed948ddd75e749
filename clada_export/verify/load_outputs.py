"""What the graph says about its own logits: `log_sum_exp` and `entropy` against NumPy in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clada_export.runtime import StepOutput, surprisal_entropy
from clada_export.verify.report import Check

TOLERANCE = 1e-3
"""Nats. Sums over a vocabulary in float32 are good to 1e-5; a load is worth hundredths of a standard deviation."""
ROUNDING = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""What one rounding of a logit may change, as a share of it: a 16-bit engine may use the logits before they are rounded."""


@dataclass(frozen=True)
class LoadOutputs:
    """`error`: the largest difference from the logits, in nats; `largest_logit`: of those logits, for scale."""

    error: float
    largest_logit: float


def load_output_error(
    logits: npt.NDArray[np.float32], log_sum_exp: npt.NDArray[np.floating], entropy: npt.NDArray[np.floating]
) -> float:
    """The largest difference, in nats, from what the logits [B, V] give; infinite where one is NaN."""
    best = logits.argmax(-1)
    surprisal, wanted = surprisal_entropy(logits, best)
    total = surprisal + logits.max(-1)
    error = np.maximum(np.abs(np.asarray(log_sum_exp, np.float64) - total), np.abs(np.asarray(entropy, np.float64) - wanted))
    return float(np.where(np.isnan(error), np.inf, error).max())


def load_output_bound(largest_logit: float, computes_in: str = "float32") -> float:
    """How far they may be apart, in nats."""
    return TOLERANCE + 2 * ROUNDING[computes_in] * largest_logit


def measure_load_outputs(outputs: Sequence[StepOutput]) -> LoadOutputs | None:
    """Hold what the graph said of each output to its logits; None if the export has no such outputs."""
    errors, largest = [], 0.0
    for output in outputs:
        if output.log_sum_exp is None or output.entropy is None:
            return None
        errors.append(load_output_error(output.logits, output.log_sum_exp, output.entropy))
        largest = max(largest, float(np.abs(output.logits).max()))
    return LoadOutputs(max(errors), largest)


def load_output_check(name: str, found: LoadOutputs, computes_in: str = "float32") -> Check:
    """Hold the outputs of a prompt and of a decoded token to their bound.

    Args:
        name: of the case.
    """
    bound = load_output_bound(found.largest_logit, computes_in)
    passed = found.error <= bound
    why = "" if passed else f"log_sum_exp or entropy is {found.error:.3g} nats from what the logits give; allowed {bound:.3g}"
    return Check(f"load outputs ({name})", passed, {"nats": found.error}, {"nats": bound}, why)
