"""Verification has its own way to the op's constants: a fault of the scorer, which calibration and export share, is found."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

import clada_export.verify
from clada_export.errors import VerificationError
from clada_export.op import scorer
from clada_export.op.reference import SparseFFNTensors, dequantize_shadow, quantize_shadow
from clada_export.pipeline import export
from clada_export.verify.constants import OpConstants
from clada_export.verify.derivation import down_row_norms, four_bit_copy
from clada_export.verify.report import Check
from tests.tiny_models import ffn_names

Folder = Callable[[str], Path]
OPTIONS = {"sparsity": 0.5, "calibration_context": 48, "load_response": False}
LAYER = ffn_names("llama")[0]
WEIGHTS = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 2), st.sampled_from([32, 64])),
                     elements=st.floats(-1e4, 1e4, width=32))  # fmt: skip


def constants_check(model: Path, wanted: Iterable[tuple[str, SparseFFNTensors]]) -> Check:
    """What is said of a file that should hold these constants."""
    constants = OpConstants(model)
    for name, tensors in wanted:
        constants.compare(name, tensors)
    return constants.check()


def test_no_import_of_what_the_export_scores_with() -> None:
    """Nor of calibration: what it measured must not be what it is measured by."""
    modules = Path(clada_export.verify.__file__).parent.glob("*.py")
    imported = {
        f"{node.module}.{name.name}"
        for path in modules
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for name in node.names
    }
    shared = ("clada_export.calibration", "clada_export.op.scorer", "clada_export.op.merge", "clada_export.methods")
    assert not [name for name in imported if name.startswith(shared) or name.endswith(".quantize_shadow")]


# --- the derivation ---


@given(WEIGHTS)
def test_every_weight_is_at_its_nearest_level(weights: np.ndarray) -> None:
    shadow, scale = four_bit_copy(weights)
    found = dequantize_shadow(torch.from_numpy(shadow), torch.from_numpy(scale)).double().numpy()
    step, lowest = (np.repeat(scale[..., which].astype(np.float64), 32, axis=-1) for which in (0, 1))
    levels = lowest[..., None] + step[..., None] * np.arange(16)
    nearest = np.abs(levels - weights[..., None]).min(axis=-1)
    assert (np.abs(found - weights) <= nearest + 1e-5 * np.abs(weights) + 1e-30).all()
    blocks = weights.reshape(*weights.shape[:2], -1, 32).astype(np.float64)
    np.testing.assert_allclose(scale[..., 1], blocks.min(-1), rtol=2**-10, atol=1e-7)
    np.testing.assert_allclose(scale[..., 0], (blocks.max(-1) - blocks.min(-1)) / 15, rtol=2**-10, atol=1e-7)


@given(WEIGHTS)
def test_both_ways_to_the_copy_agree(weights: np.ndarray) -> None:
    for found, wanted in zip(four_bit_copy(weights), quantize_shadow(torch.from_numpy(weights)), strict=True):
        np.testing.assert_array_equal(found, wanted.numpy())


def test_norms_are_those_of_the_down_rows() -> None:
    weights = np.random.default_rng(0).normal(size=(96, 64)).astype(np.float32)
    np.testing.assert_allclose(down_row_norms(weights), [np.linalg.norm(row.astype(np.float64)) for row in weights], rtol=1e-7)


# --- mutations of the scorer ---


def _changed_scale(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda w_out: change(w_out.float()).contiguous()


def _changed_shadow(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda w_in: change(*quantize_shadow(w_in))


def _swapped_nibbles(shadow: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    packed = shadow.view(torch.uint8)
    return ((packed >> 4) | (packed << 4)).view(torch.int8), scale


def _rounded_down(w_in: Tensor) -> tuple[Tensor, Tensor]:
    shadow, scale = quantize_shadow(w_in)
    f, n, half = shadow.shape
    step, lowest = (part.float().unsqueeze(-1) for part in scale.unbind(-1))
    level = ((w_in.float().reshape(f, n, -1, 32) - lowest) / step).floor().clamp(0, 15).to(torch.uint8)
    return (level[..., :16] | (level[..., 16:] << 4)).reshape(f, n, half).view(torch.int8), scale


SCALE, SHADOW = "neuron_scale", "quantize_shadow"
NORM, COPY = "from the norm of the neuron's down row", "4-bit copy"
MUTATIONS: dict[str, tuple[str, Callable[..., object], str]] = {
    "a norm of something else": (SCALE, _changed_scale(lambda w: w.T.reshape(w.shape).norm(dim=1)), NORM),
    "a norm without its root": (SCALE, _changed_scale(lambda w: w.square().sum(dim=1)), NORM),
    "a norm of the wrong order": (SCALE, _changed_scale(lambda w: w.abs().sum(dim=1)), NORM),
    "a norm that is a thousandth off": (SCALE, _changed_scale(lambda w: 1.001 * w.norm(dim=1)), NORM),
    "norms of other neurons": (SCALE, _changed_scale(lambda w: w.norm(dim=1).roll(1)), NORM),
    "swapped nibbles": (SHADOW, _changed_shadow(_swapped_nibbles), COPY),
    "sixteen steps a block": (SHADOW, _changed_shadow(lambda q, s: (q, (s * torch.tensor([15 / 16, 1])).half())), COPY),
    "offset before scale": (SHADOW, _changed_shadow(lambda q, s: (q, s.flip(-1).contiguous())), COPY),
    "levels rounded down": (SHADOW, _rounded_down, COPY),
    "gate and up swapped": (SHADOW, lambda w: quantize_shadow(w.flip(1)), COPY),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_fault_of_the_scorer_fails_the_export(
    mutation: str, model_folder: Folder, kept_traces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration, which simulates with the same scorer, sees nothing of it; the message says which layer and what."""
    name, change, said = MUTATIONS[mutation]
    monkeypatch.setattr(scorer, name, change)
    with pytest.raises(VerificationError, match=rf"constants of the op: {LAYER}: .*{said}"):
        export(model_folder("llama"), tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


# --- the file ---


def held_by(model: Path) -> dict[str, SparseFFNTensors]:
    """What the op's nodes of an ONNX file hold, by FFN."""
    held = {}
    for node in ir.load(model).graph:
        if node.op_type == "SparseFFN":
            constants = {str(value.name).rpartition(".")[2]: value.const_value for value in node.inputs if value is not None}
            arrays = {key: torch.from_numpy(item.numpy().copy()) for key, item in constants.items() if item is not None}
            held[node.metadata_props["clada.ffn"]] = SparseFFNTensors(**arrays)
    return held


def test_what_the_file_holds_is_compared(
    model_folder: Folder, kept_traces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clada_export.verify.constants.NEURONS_AT_ONCE", 40)  # 96 neurons: three parts
    path = tmp_path / "out" / "model.onnx"
    assert export(model_folder("llama"), path.parent, **OPTIONS, verify=False).plan.score == "shadow"
    held = held_by(path)
    right = constants_check(path, held.items())
    assert right.passed and set(right.numbers) == {"threshold", "neuron_scale", "shadow_steps", "shadow_moved"}
    assert max(right.numbers.values()) == 0.0

    def changed(**values: Tensor) -> str:
        tensors = held[LAYER]
        check = constants_check(path, {**held, LAYER: SparseFFNTensors(**{**vars(tensors), **values})}.items())
        assert not check.passed
        return check.why

    tensors = held[LAYER]
    assert tensors.neuron_scale is not None and tensors.shadow_scale is not None
    assert f"{LAYER}: the threshold differs from the plan's" in changed(threshold=tensors.threshold + 0.5)
    assert f"{LAYER}: neuron_scale is up to inf" in changed(neuron_scale=tensors.neuron_scale[:-1])
    assert f"{LAYER}: neuron_scale is up to inf" in changed(neuron_scale=tensors.neuron_scale * torch.nan)
    assert f"{LAYER}: the 4-bit copy" in changed(shadow_scale=tensors.shadow_scale * torch.tensor([1.0, 1.1]).half())
    last = tensors.shadow_scale.clone()
    last[-1, 0, 0, 0] *= 2
    assert f"{LAYER}: the 4-bit copy is up to" in changed(shadow_scale=last)
    missing = constants_check(path, [item for item in held.items() if item[0] != LAYER])
    assert not missing.passed and f"{LAYER}: the plan and the source have no such layer" in missing.why
