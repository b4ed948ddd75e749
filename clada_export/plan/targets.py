"""What the stages before the targets know of them: the targets themselves come later (`clada_export.targets`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetTraits:
    """One target.

    Attributes:
        compiles_graphs: it takes ONNX models as a source, and not only PyTorch models.
        timed: its layers run in ONNX Runtime on the CPU, where a plan is chosen by the clock.
        fuses_attention: attention becomes a node of ONNX Runtime's own, unless the graph is to be portable.
        no_quantising: why it does not run quantised weights, or None if it does.
        no_merging: why it does not run FFNs whose experts are merged, or None if it does.
    """

    compiles_graphs: bool
    timed: bool
    fuses_attention: bool
    no_merging: str | None = None
    no_quantising: str | None = None


TARGET_TRAITS = {
    "ort": TargetTraits(compiles_graphs=True, timed=True, fuses_attention=True),
    "trt": TargetTraits(
        compiles_graphs=False,
        timed=False,
        fuses_attention=False,
        no_merging=(
            "TensorRT: merged weights are made only in runs that hold a dense token and kept otherwise, and a TensorRT engine "
            "can't leave out an output"
        ),
        no_quantising="there is no TensorRT plugin for quantised weights",
    ),
}
"""By the name that `--target` takes and the manifest keeps."""


def merging_refused(target: str, policy: str) -> str | None:
    """Why a target does not run a policy that merges experts, for a message; None if it does."""
    why = TARGET_TRAITS[target].no_merging
    others = " or ".join(f"--target {name}" for name, traits in TARGET_TRAITS.items() if traits.no_merging is None)
    return None if why is None else f"policy {policy!r} does not run on {why}; use {others} or another --policy"
