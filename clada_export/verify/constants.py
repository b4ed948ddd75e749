"""What the engine's file holds for the op, against what verification derives from the source (`verify.derivation`).

An engine that scores its neurons by wrong constants skips the wrong ones and is no slower for it, and a reference that took the
same constants would agree with it. So the file itself is read.

Bounds: a threshold is the plan's, to the bit. A norm is summed in another order: 1e-5 of itself. A weight of the 4-bit copy
that lies between two levels may be rounded to either: none is further away than one step of its block, and no more than 1e-3 of
them are off at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from clada_export.op.reference import SparseFFNTensors, dequantize_shadow
from clada_export.verify.report import Check
from graph_passes.emit import attribute_values
from graph_passes.op import DOMAIN, OP_TYPE, SHADOW_BLOCK, SparseFFNAttributes, input_names
from graph_passes.search import FFN_NAME

CONSTANTS = ("threshold", "neuron_scale", "shadow", "shadow_scale")
NORM_TOLERANCE = 1e-5
STEP_TOLERANCE = 1.01
MOVED_SHARE = 1e-3
BOUNDS = {"threshold": 0.0, "neuron_scale": NORM_TOLERANCE, "shadow_steps": STEP_TOLERANCE, "shadow_moved": MOVED_SHARE}
MEANINGS = {
    "threshold": "the threshold differs from the plan's by up to {:.3g}",
    "neuron_scale": "neuron_scale is up to {:.3g} of itself from the norm of the neuron's down row",
    "shadow_steps": "the 4-bit copy is up to {:.3g} steps from the weights' nearest levels",
    "shadow_moved": "{:.3g} of the 4-bit copy's weights are not at their nearest levels",
}
NEURONS_AT_ONCE = 1024
"""Whose 4-bit copies are taken apart together: a whole layer would be gigabytes of a large model."""
SAID = 3
"""How many faults are named; there may be one a layer."""


class OpConstants:
    """What the engine's file holds, compared with what it should hold a layer at a time.

    Args:
        model: the file that the engine runs, or that it was built from.
    """

    def __init__(self, model: Path) -> None:
        self._nodes: dict[str, list[ir.Node]] = {}
        for name, node in _nodes(model):
            self._nodes.setdefault(name, []).append(node)
        self._worst: dict[str, float] = {}
        self._faults: dict[str, list[str]] = {}

    def compare(self, name: str, wanted: SparseFFNTensors) -> None:
        """Read the nodes of an FFN, unless that was done.

        Args:
            wanted: what they should hold.
        """
        if name in self._faults:
            return
        faults = self._faults[name] = []
        for node in self._nodes.get(name, ()):
            for number, value in _compare(_constants(node), wanted).items():
                self._worst[number] = max(self._worst.get(number, 0.0), value)
                if not value <= BOUNDS[number]:
                    faults.append(f"{name}: {MEANINGS[number].format(value)}; allowed {BOUNDS[number]:.3g}")
            _release(node)

    def check(self) -> Check:
        """The worst of each number over all layers; a failure names the layers, in the order of the file."""
        faults = [
            fault
            for name in self._nodes
            for fault in self._faults.get(name, [f"{name}: the plan and the source have no such layer"])
        ]
        said = "; ".join(faults[:SAID]) + (f"; and {len(faults) - SAID} more" if len(faults) > SAID else "")
        bounds = {number: BOUNDS[number] for number in self._worst}
        return Check("constants of the op", not faults, self._worst, bounds, said)


def _nodes(model: Path) -> Iterator[tuple[str, ir.Node]]:
    """The op's nodes, each with the name of its FFN."""
    for node in ir.load(model).graph:
        if (node.domain, node.op_type) == (DOMAIN, OP_TYPE):
            yield node.metadata_props.get(FFN_NAME, str(node.name)), node


def _constants(node: ir.Node) -> dict[str, npt.NDArray[np.generic]]:
    """What the node holds for its scores, by input name."""
    attributes = SparseFFNAttributes.from_onnx(attribute_values(node))
    named = dict(zip(input_names(attributes), node.inputs, strict=True))
    held = {name: value.const_value for name, value in named.items() if name in CONSTANTS and value is not None}
    return {name: tensor.numpy() for name, tensor in held.items() if tensor is not None}


def _release(node: ir.Node) -> None:
    """Let go of the parts of the file that were read."""
    for value in node.inputs:
        if value is not None and isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.release()


def _compare(found: Mapping[str, npt.NDArray[np.generic]], wanted: SparseFFNTensors) -> dict[str, float]:
    """How far they are apart, in the numbers of `BOUNDS`; infinite where one is missing, has another shape or is no number."""
    numbers = {"threshold": _largest(found.get("threshold"), wanted.threshold)}
    if wanted.neuron_scale is not None:
        numbers["neuron_scale"] = _largest(found.get("neuron_scale"), wanted.neuron_scale, relative=True)
    if wanted.shadow is not None and wanted.shadow_scale is not None:
        shadow, scale = found.get("shadow"), found.get("shadow_scale")
        if shadow is None or scale is None or shadow.shape != tuple(wanted.shadow.shape):
            return {**numbers, "shadow_steps": float("inf")}
        if scale.shape != tuple(wanted.shadow_scale.shape):
            return {**numbers, "shadow_steps": float("inf")}
        if _same(shadow, wanted.shadow) and _same(scale, wanted.shadow_scale):
            return {**numbers, "shadow_steps": 0.0, "shadow_moved": 0.0}
        parts = [
            _apart(
                dequantize_shadow(torch.from_numpy(shadow[rows].copy()), torch.from_numpy(scale[rows].copy())),
                dequantize_shadow(wanted.shadow[rows], wanted.shadow_scale[rows]),
                wanted.shadow_scale[rows],
            )
            for rows in (slice(start, start + NEURONS_AT_ONCE) for start in range(0, len(shadow), NEURONS_AT_ONCE))
        ]
        numbers["shadow_steps"] = max(steps for steps, _ in parts)
        numbers["shadow_moved"] = sum(moved for _, moved in parts) / (2 * shadow.size)
    return numbers


def _same(found: npt.NDArray[np.generic], wanted: torch.Tensor) -> bool:
    """Whether all numbers are equal, and are numbers: then there is nothing to measure."""
    other = wanted.numpy()
    return found.dtype == other.dtype and np.array_equal(found, other) and bool(np.isfinite(found).all())


def _largest(found: npt.NDArray[np.generic] | None, wanted: torch.Tensor, relative: bool = False) -> float:
    if found is None or found.shape != tuple(wanted.shape):
        return float("inf")
    right = wanted.double().numpy()
    error = np.abs(found.astype(np.float64) - right)
    if relative:
        error = error / np.maximum(np.abs(right), np.finfo(np.float32).tiny)
    return _worst(error)


def _apart(found: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor) -> tuple[float, int]:
    """(the largest distance in steps of its block, how many weights are further than half a step away)."""
    step = scale[..., 0].float().repeat_interleave(SHADOW_BLOCK, dim=-1)
    # A block of equal weights has no step; its weights are equal, up to the rounding of the block's minimum.
    least = wanted.abs() * 2.0**-10 + torch.finfo(torch.float32).tiny
    error = ((found - wanted).abs() / torch.maximum(step, least)).double().numpy()
    return _worst(error), int((~(error <= 0.5)).sum())


def _worst(error: npt.NDArray[np.float64]) -> float:
    return float(np.where(np.isnan(error), np.inf, error).max(initial=0.0))
