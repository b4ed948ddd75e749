"""Measure an FFN whose experts are merged: there is no threshold to choose, and not h but the FFN's output changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clada_export.calibration.drift import Drift, Meter
from clada_export.calibration.statistics import HIGHEST_CETT
from clada_export.decoder.ffn import EagerFFN
from clada_export.decoder.tap import FFNTap
from clada_export.op.merge import MergingFFN
from clada_export.op.scorer import layer_attributes, layer_tensors
from clada_export.plan.method import Method


@dataclass(frozen=True)
class MergedDrift:
    """The drift, and for each FFN the mean relative error of its output, ||merged FFN(x) - FFN(x)|| / ||FFN(x)||, on the inputs
    of the merged model."""

    drift: Drift
    error: np.ndarray


def measure_merged(
    meter: Meter, ffns: Sequence[EagerFFN], method: Method, step: Callable[[], None] = lambda: None
) -> MergedDrift:
    """Run held-out windows as an engine does: the prompt dense, and as the segment that every FFN is merged for.

    Args:
        method: its layers are those of `ffns`, all with `merge`.
        step: called after every window.
    """
    merging = []
    for ffn, layer in zip(ffns, method.layers, strict=True):
        arrays = method.arrays[layer.name]
        assert arrays.router is not None
        tensors = layer_tensors(ffn, method.score, torch.zeros(1), neurons=arrays.neurons)
        merging.append(MergingFFN(tensors, layer_attributes(ffn, method.score, method.rule), arrays.router))
    error = np.zeros((2, len(merging)))
    seen: dict[int, Tensor] = {}

    def inner(index: int, x: Tensor, h: Tensor) -> None:
        seen[index] = x.reshape(-1, x.shape[-1])

    def outer(index: int, y: Tensor) -> Tensor:
        x, rows = seen.pop(index), y.reshape(-1, y.shape[-1]).clone()
        dense = rows[meter.prompt :].float()
        found = merging[index].run(x[meter.prompt :], merging[index].merge(x[: meter.prompt]))
        norm = dense.double().norm(dim=-1)
        usable = norm > 0
        relative = (found - dense).double().norm(dim=-1)[usable] / norm[usable]
        error[0, index] += float(relative.nan_to_num(nan=HIGHEST_CETT).clamp(max=HIGHEST_CETT).sum())
        error[1, index] += int(usable.sum())
        rows[meter.prompt :] = found.to(rows.dtype)
        return rows.reshape(y.shape)

    drift = meter.through(lambda window: FFNTap(ffns, inner=inner, outer=outer), step)
    return MergedDrift(drift, error[0] / np.maximum(error[1], 1))
