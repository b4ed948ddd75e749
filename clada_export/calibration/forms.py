"""In which form the weights are: forms are measured with one calibrator, and the one that reads the fewest bytes is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clada_export.calibration.budget import BudgetUnmetError
from clada_export.calibration.calibrate import CalibrationOptions, CalibrationResult, Calibrator, Policy
from clada_export.calibration.drift import Drift
from clada_export.calibration.soundness import plain
from clada_export.calibration.windows import View

HOPEFUL = 0.8
"""Of its dense bytes an FFN whose gate and up are read in full may come to read, at best: down rows are a third of it, and more
than six in ten of them are hardly ever skipped."""


@dataclass(frozen=True)
class FormCandidate:
    """A form of the weights.

    Attributes:
        name: what `--weights` calls it.
        view: makes the model computed with it, which takes a while.
        record: what a plan's `source` says of it.
        item: bytes of an FFN's weight.
        ffn: bytes that the FFNs read for a token that skips nothing.
        others: bytes that all other products read for a token.
    """

    name: str
    view: Callable[[], View]
    record: dict[str, Any]
    item: float
    ffn: float
    others: float

    def bytes_read(self, relative: float) -> float:
        """Bytes that a token reads.

        Args:
            relative: of the FFNs, to those that it would read without skipping.
        """
        return self.others + self.ffn * relative


def calibrate_forms(
    calibrator: Calibrator,
    policy: Policy,
    source: dict[str, Any],
    options: CalibrationOptions,
    candidates: Sequence[FormCandidate],
) -> tuple[FormCandidate, CalibrationResult]:
    """Calibrate the forms, the narrowest first, and keep the one that reads the fewest bytes a token within the budget.

    A form that is over the budget with nothing skipped is measured no further. Once one is found, a wider one is only measured
    where it could still read less. A single candidate is taken as it is, whatever it costs.

    Args:
        candidates: the narrowest first.

    Returns:
        The form, and its plan. The plan's `calibration.weights` lists the forms that were measured.

    Raises:
        BudgetUnmetError: no form keeps the budget; names the nearest.
    """
    policy.check(calibrator.decoder.ffns)
    best: tuple[float, FormCandidate, CalibrationResult, View] | None = None
    rows: list[dict[str, Any]] = []
    nearest: tuple[float, str, str] | None = None
    for candidate in candidates:
        if best is not None and candidate.bytes_read(HOPEFUL) >= best[0]:
            continue
        view = candidate.view()
        calibrator.compute_by(view)
        calibrator.expect(f"weights {candidate.name}", 1)
        dense = calibrator.dense_drift()
        row = {"weights": candidate.name, **_told(dense)}
        rows.append(row)
        if len(candidates) > 1 and not options.keeps(dense):
            cost = options.budget.cost(dense)
            if nearest is None or cost < nearest[0]:
                nearest = cost, candidate.name, options.budget.told(dense)
            continue
        result = calibrator.calibrate(
            policy, {**source, "weights": candidate.record}, replace(options, item=candidate.item, dense=dense)
        )
        size = candidate.bytes_read(result.plan.calibration.relative_bytes or 1.0)
        row |= {"sparsity": result.plan.expected_sparsity, "bytes": round(size)}
        if best is None or size < best[0]:
            best = size, candidate, result, view
    if best is None:
        assert nearest is not None
        raise BudgetUnmetError(
            f"no form of the weights keeps the budget {options.budget}: the nearest, {nearest[1]}, already costs {nearest[2]} "
            "on the held-out text with nothing skipped. Give a larger --budget, or --weights float32",
            nearest[0],
            0.0,
        )
    _, chosen, result, view = best
    calibrator.compute_by(view)
    record = result.plan.calibration
    details = {**record.details, "weights": plain(rows)}
    plan = replace(result.plan, calibration=replace(record, details=details))
    return chosen, replace(result, plan=plan)


def _told(drift: Drift) -> dict[str, float]:
    """What a form costs with nothing skipped."""
    return {"kl": drift.mean_kl, "ppl_increase": drift.ppl_increase, "top1": float(drift.top1.mean())}
