"""Checkpoints of mixtures that are damaged or of no known kind, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GraniteMoeForCausalLM

from clada_export.errors import CladaError, UnsupportedModelError, UsageError
from clada_export.export_options import ExportOptions
from clada_export.pipeline import export
from clada_export.source.load import load_source
from tests.moe_checkpoints import (
    HIDDEN,
    SIZE,
    write_granite_moe,
    write_llama_moe,
)

EXPERT = "model.layers.0.mlp.calculator.experts.weight_up.3"


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"num_selects": 7}, UsageError, "num_selects: 7 experts are chosen of 6"),
        ({"num_selects": 0}, UsageError, "num_selects: 0; an integer of at least 1"),
        ({"num_experts": "six"}, UsageError, "num_experts: 'six'"),
        ({"num_experts": 7, "size_experts": None}, UsageError, "7 experts do not divide 96 neurons"),
        ({"num_experts": 4, "size_experts": None}, UsageError, "the weights hold tensors that .*experts.weight_down.4"),
        ({"num_experts": 8, "size_experts": None}, UsageError, "weights are missing .*experts.weight_down.6"),
        (
            {"size_experts": [[8, 24, 16, 16, 16, 16], [16] * 6]},
            UnsupportedModelError,
            "layer 0 has experts of 8 to 24 neurons",
        ),
        ({"size_experts": [[16] * 6]}, UsageError, "size_experts: a list of 2 lists"),
        ({"size_experts": [[16] * 6, [16] * 5]}, UsageError, "layer 1 has .* wanted are 6 sizes"),
        ({"gate_network": "linear"}, UsageError, "hold tensors|are missing"),
        ({"score_scale_factor": [1.0]}, UsageError, "score_scale_factor: .* a list of 2"),
        ({"score_scale_factor": 0}, UsageError, "score_scale_factor: 0; a number above 0"),
        ({"score_scale_factor": [1.0, "2"]}, UsageError, "score_scale_factor"),
        ({"gate_use_softmax": False}, UnsupportedModelError, "gate_use_softmax: False; only True"),
        ({"add_weight_norm": True}, UnsupportedModelError, "add_weight_norm: True"),
        ({"calculator_type": "SwitchDropTokenCalculator"}, UnsupportedModelError, "calculator_type: .* drop tokens"),
        ({"gate_type": "SwitchBalancedGate"}, UnsupportedModelError, "gate_type"),
        ({"multiply_gate_scores": False}, UnsupportedModelError, "multiply_gate_scores"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, UsageError, "rope_scaling: .*yarn.* linear or dynamic"),
        ({"hidden_act": "swash"}, UsageError, "can't build the model: .*swash"),
        ({"num_hidden_layers": 1, "size_experts": None, "score_scale_factor": 1.0}, UsageError, "no place for: model.layers.1"),
    ],
)
def test_bad_configs(fields: dict[str, Any], error: type[CladaError], said: str, tmp_path: Path) -> None:
    path = write_llama_moe(tmp_path / "tiny")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(error, match=said):
        load_source(str(path))


def test_an_unknown_gate_network(tmp_path: Path) -> None:
    path = write_llama_moe(tmp_path / "tiny", gate_network="cosine")
    with pytest.raises(UnsupportedModelError, match="gate_network: 'cosine' is unknown; mlp and linear"):
        load_source(str(path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.__delitem__(EXPERT), f"weights are missing that the config asks for: {EXPERT}"),
        (lambda state: state.__delitem__("model.norm.weight"), "missing .* model.norm.weight"),
        (lambda state: state.update({"model.extra": torch.ones(2)}), "no place for: model.extra"),
        (
            lambda state: state.update({EXPERT: torch.ones(SIZE + 1, HIDDEN)}),
            rf"{EXPERT}: \(17, 64\) in the weights, \(16, 64\)",
        ),
        (lambda state: state.update({EXPERT: torch.full((SIZE, HIDDEN), torch.nan)}), "up_proj.weight: 1024 of .* NaN"),
    ],
)
def test_bad_weights(change: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path) -> None:
    path = write_llama_moe(tmp_path / "tiny", change=change)
    with pytest.raises(UsageError, match=said):
        load_source(str(path))


def test_an_activation_that_the_op_does_not_have(tmp_path: Path) -> None:
    path = write_granite_moe(tmp_path / "tiny", hidden_act="mish")
    assert isinstance(load_source(str(path)).decoder.module, GraniteMoeForCausalLM)
    with pytest.raises(UnsupportedModelError, match=r"neither act\(up\) nor act\(gate\) \* up .*with act one of silu"):
        export(path, tmp_path / "out", ExportOptions(policy="ds-moe"))
