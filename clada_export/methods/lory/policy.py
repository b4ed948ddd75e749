"""Lory (arXiv 2405.03133): experts' weights merged into one FFN for each segment, by a router that read the segment before.

Lory trains experts and routers from scratch. Here a dense model's FFN is split into experts, the model is frozen and only the
routers are trained: our own derivation, and a poor one to expect quality of, since the mean of neurons that were never trained
to be merged is none of them. The segment is the prompt: it runs dense, and what follows runs the merged FFN.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from clada_export.calibration.calibrate import CalibrationOptions, CalibrationResult, Calibrator
from clada_export.calibration.context import PolicyContext
from clada_export.calibration.segment_state import plan_segment_state
from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UsageError
from clada_export.methods.common.policy import MethodPolicy
from clada_export.methods.common.routed import TrainedLayer, train_layers
from clada_export.methods.lory.segments import Segments, collect_segments
from clada_export.methods.lory.train import SETTINGS, merge_order, train_lory
from clada_export.op.scorer import layer_attributes, layer_tensors
from clada_export.plan.method import Method, draft_layers


@dataclass(frozen=True, kw_only=True)
class LoryPolicy(MethodPolicy):
    """E = 1 / (1 - sparsity) experts merged into one; the op runs dense rows only."""

    name: str = "lory"
    scores: tuple[str, ...] = ("gate",)
    trained: bool = True
    segment_state: bool = True

    def check(self, ffns: Sequence[EagerFFN]) -> None:
        """Any FFN whose neurons two experts divide."""
        super().check(ffns)
        if self.settings.granule is not None:
            raise UsageError(
                f"--granule {self.settings.granule}: the experts of policy {self.name!r} follow from the sparsity: f / E "
                "neurons, with E = 1 / (1 - sparsity); leave --granule out"
            )
        odd = next((ffn for ffn in ffns if ffn.intermediate_size % 2), None)
        if odd is not None:
            raise UsageError(
                f"policy {self.name!r}: {odd.name} has {odd.intermediate_size} neurons, which 2 experts do not divide"
            )

    def left_out(self, ffns: Sequence[EagerFFN]) -> str | None:
        """Always: the clock can't time it."""
        return "it merges experts for each segment, which the clock can't time; ask for it by name"

    def plan(self, calibrator: Calibrator, source: dict[str, Any], options: CalibrationOptions) -> CalibrationResult:
        """Merge as many experts as the sparsity says, or two and hold them to the budget."""
        self.check_options(options.prune is not None)
        return plan_segment_state(calibrator, self, source, options)

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """One method: routers trained for the number of experts that the sparsity says.

        Raises:
            UsageError: a sparsity that is not 1 - 1 / E, or an E that does not divide an FFN; names the nearest that will do.
        """
        self.check(context.ffns)
        widths = {ffn.name: len(context.kept.get(ffn.name, range(ffn.intermediate_size))) for ffn in context.ffns}
        experts = _experts(context.sparsity, widths)
        start = time.perf_counter()
        segments = collect_segments(
            context.decoder,
            context.windows,
            self.settings.rows,
            context.seed,
            lambda done, total: context.progress("segments", done, total),
        )

        def one(index: int, kept: np.ndarray | None) -> TrainedLayer:
            return _train(context.ffns[index], segments, index, experts, kept, context.seed)

        drafts = draft_layers(context.ffns, merge=experts)
        routed = train_layers(self.name, context, drafts, one, rows=segments.rows, start=start)
        details = {"training": routed.training}
        return (Method(self.name, "gate", "threshold", routed.layers, routed.arrays, ("sparsity",), details),)


def _train(ffn: EagerFFN, segments: Segments, index: int, experts: int, kept: np.ndarray | None, seed: int) -> TrainedLayer:
    """The router of FFN `index`."""
    w_in = ffn.w_in() if kept is None else ffn.w_in()[torch.from_numpy(kept)]
    order = merge_order(w_in, experts, seed, name=ffn.name)
    neurons = order if kept is None else kept[order]
    router, report = train_lory(
        segments.means[index],
        segments.inputs[index],
        layer_tensors(ffn, "gate", torch.zeros(1), neurons=neurons),
        layer_attributes(ffn, "gate", "threshold"),
        experts,
        name=ffn.name,
        settings=replace(SETTINGS, seed=seed + index),
    )
    return TrainedLayer(router, neurons, report)


def _experts(sparsity: float, widths: dict[str, int]) -> int:
    """E of a sparsity.

    Args:
        widths: neurons of every FFN, by name.
    """
    wanted = max(2, round(1.0 / (1.0 - sparsity))) if sparsity < 1.0 else 2
    misfit = next((name for name, width in widths.items() if width % wanted), None)
    if misfit is None and abs(1.0 - 1.0 / wanted - sparsity) <= 5e-3:
        return wanted
    fitting = [count for count in range(2, min(widths.values()) + 1) if all(width % count == 0 for width in widths.values())]
    if not fitting:
        raise UsageError(
            f"policy 'lory': no number of experts divides all FFNs ({', '.join(map(str, sorted(set(widths.values()))))})"
        )
    nearest = min(fitting, key=lambda count: abs(1.0 - 1.0 / count - sparsity))
    why = f"{misfit} has {widths[misfit]} neurons, which {wanted} experts do not divide" if misfit else "E is a whole number"
    raise UsageError(
        f"policy 'lory' merges E experts into one, which is a sparsity of 1 - 1 / E, not {sparsity:.4g} ({why}); the nearest "
        f"is --sparsity {1.0 - 1.0 / nearest:.4g} (E = {nearest})"
    )
