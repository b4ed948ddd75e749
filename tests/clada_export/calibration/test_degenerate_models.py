"""Models whose numbers degenerate: a sound plan, or an error that says which layer and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clada_export.calibration import Budget, CalibrationData, CalibrationOptions, calibrate, load_calibration_data
from clada_export.calibration.allocation import ALLOCATIONS
from clada_export.calibration.drift import compare, drift_of
from clada_export.calibration.soundness import LARGEST_LOG, WORST, plain
from clada_export.decoder.digest import weights_digest
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UnsupportedModelError, UsageError
from clada_export.export_options import ExportOptions
from clada_export.methods import POLICIES, PolicySettings, get_policy
from clada_export.methods.static import WeightPruning
from clada_export.pipeline import export
from clada_export.plan.plan import SparsityPlan
from clada_export.runtime import load_engine
from clada_export.verify.drift import drift_check
from clada_export.verify.numbers import compare_logits
from tests.tiny_models import tiny_model

Change = Callable[[nn.Module], None]
GOALS: dict[str, dict[str, Any]] = {
    "sparsity": {"sparsity": 0.5},
    "ppl": {"budget": Budget.parse("ppl=50%")},
    "kl": {"budget": Budget.parse("kl=1.5")},
    "cett": {"budget": Budget.parse("cett=0.5")},
}


def _ffn(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, item) for name, item in model.named_parameters() if ".mlp." in name)


def _zero(part: str) -> Change:
    def change(model: nn.Module) -> None:
        for name, item in _ffn(model):
            if part in name:
                item.zero_()

    return change


def _one_neuron(model: nn.Module) -> None:
    for name, item in _ffn(model):
        if "down" in name:
            item[:, 1:] = 0.0


def _embeddings(value: float) -> Change:
    def change(model: Any) -> None:
        model.get_input_embeddings().weight.fill_(value)
        model.get_output_embeddings().weight.fill_(value)

    return change


def _times(factor: float, part: str = "") -> Change:
    def change(model: nn.Module) -> None:
        for name, item in model.named_parameters():
            if part in name:
                item.mul_(factor)

    return change


def _put(value: float, name: str) -> Change:
    def change(model: nn.Module) -> None:
        model.get_parameter(name).view(-1)[0] = value

    return change


HUGE = "FFN weights of 1e8"
UNTRAINABLE = {"d2dmoe": "gives no router", "lory": "activations are not finite"}
"""Policies whose training squares activations that large."""
SOUND: dict[str, Change] = {
    "FFNs that give 0": _zero(""),
    "one FFN that gives 0": _zero(".0."),
    "down projections of 0": _zero("down"),
    "up projections of 0": _zero("up"),
    "one neuron that is alive": _one_neuron,
    "embeddings of 0": _embeddings(0.0),
    "everything is 0": _times(0.0),
    "weights of 1e-20": _times(1e-20),
    "FFN weights of 1e-15": _times(1e-15, ".mlp."),
    HUGE: _times(1e8, ".mlp."),
}
BROKEN: dict[str, tuple[Change, str]] = {
    "NaN in a weight": (_put(float("nan"), "model.layers.1.mlp.down_proj.weight"), "the model's logits are not finite"),
    "NaN in the first layer": (
        _put(float("nan"), "model.layers.0.mlp.up_proj.weight"),
        r"layers\.0\.mlp\.down_proj: the act",
    ),
    "embeddings of NaN": (_embeddings(float("nan")), r"layers\.0\.mlp\.down_proj: the activations are not finite"),
    "an infinite logit": (_put(float("inf"), "lm_head.weight"), "the model's logits are not finite"),
    "weights of 1e20": (_times(1e20), r"layers\.0\.mlp\.down_proj: .* not finite on the calibration text"),
    "logits of 1e30": (_times(1e30, "lm_head"), "surprisal of .* nats a token, so no perplexity can be told"),
}


def _model(change: Change) -> nn.Module:
    model = tiny_model("llama")
    with torch.no_grad():
        change(model)
    return model


def _data() -> CalibrationData:
    return load_calibration_data(None, 256, context=32)


class WithoutGradients(TorchDecoder):
    """As an ONNX graph is."""

    differentiable = False


def _calibrate(
    model: Any, policy: str, settings: PolicySettings | None = None, kind: type[TorchDecoder] = TorchDecoder, **goal: Any
) -> SparsityPlan:
    options = CalibrationOptions(**goal)
    source = {"weights_digest": "0"}
    plan = calibrate(kind(model), get_policy(policy, settings or PolicySettings(rows=64)), _data(), source, options).plan
    # What is not finite would be no JSON, and a plan that can't be read again is none.
    assert SparsityPlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))).layers == plan.layers
    return plan


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("allocation", ["cett", "sparsity", "level", "sensitivity", "fisher"])
@pytest.mark.parametrize("name", ["FFNs that give 0", "one FFN that gives 0", "one neuron that is alive", "everything is 0"])
def test_every_allocation(name: str, allocation: str, goal: str) -> None:
    assert allocation in ALLOCATIONS
    plan = _calibrate(_model(SOUND[name]), "clada", PolicySettings(allocation=allocation), **GOALS[goal])
    assert 0.0 <= plan.expected_sparsity <= 1.0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SOUND)
def test_every_policy(name: str, policy: str) -> None:
    model = _model(SOUND[name])
    if name == HUGE and policy in UNTRAINABLE:
        with pytest.raises(UsageError, match=rf"layers\.0\.mlp\.down_proj.*{UNTRAINABLE[policy]}"):
            _calibrate(model, policy, sparsity=0.5)
        return
    assert len(_calibrate(model, policy, sparsity=0.5).layers) == 2


@pytest.mark.parametrize("spec", ["wanda=0.5", "wanda=neurons:0.5", "sparsegpt=2:4", "sparsegpt=neurons:0.5"])
@pytest.mark.parametrize("name", ["FFNs that give 0", "one FFN that gives 0", "one neuron that is alive", "embeddings of 0"])
def test_pruning(name: str, spec: str) -> None:
    plan = _calibrate(_model(SOUND[name]), "clada", prune=WeightPruning.parse(spec), sparsity=0.5)
    assert plan.prune is not None


@pytest.mark.parametrize("policy", ["clada", "griffin", "d2dmoe", "wanda"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_models_are_named(name: str, policy: str) -> None:
    change, said = BROKEN[name]
    with pytest.raises(UnsupportedModelError, match=said):
        _calibrate(_model(change), policy, sparsity=0.5)


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "weights of 1e20"])
def test_broken_models_without_gradients_are_named(name: str) -> None:
    change, said = BROKEN[name]
    with pytest.raises(UnsupportedModelError, match=said):
        _calibrate(_model(change), "griffin", kind=WithoutGradients, sparsity=0.5)


@pytest.mark.parametrize("name", ["FFNs that give 0", pytest.param("one FFN that gives 0", marks=pytest.mark.long)])
def test_a_whole_export(name: str, kept_traces: None, tmp_path: Path) -> None:
    _model(SOUND[name]).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    options = ExportOptions(sparsity=0.5, calibration_context=48, calibration_cache=None)
    result = export(tmp_path / "model", tmp_path / "out", options)
    assert result.verification is not None and result.verification.passed
    assert len(load_engine(tmp_path / "out").generate([[5, 6, 7]], 4, eos_token_id=[]).tokens[0]) == 4


@pytest.mark.parametrize("policy", ["clada", "tt", "griffin"])
def test_a_given_plan_does_not_carry_weights_that_the_type_does_not_hold(
    policy: str, kept_traces: None, tmp_path: Path
) -> None:
    plan = _calibrate(tiny_model("llama"), policy, sparsity=0.5)
    broken = _model(_put(1e6, "model.layers.1.mlp.gate_proj.weight"))
    broken.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    replace(plan, source={"weights_digest": weights_digest(broken)}).save(tmp_path / "plan.json")
    options = ExportOptions(plan=tmp_path / "plan.json", calibration_context=32, verify=False, dtype="float16")
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj: a weight is not finite"):
        export(tmp_path / "model", tmp_path / "out", options)


def test_a_model_that_takes_a_few_tokens(kept_traces: None, tmp_path: Path) -> None:
    tiny_model("llama", max_position_embeddings=4).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="takes sequences of 4 tokens by its configuration; at least 8"):
        export(tmp_path / "model", tmp_path / "out", ExportOptions(sparsity=0.5))


# A sparse model may break where the dense one does not: that costs, and what it costs is a number.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_the_worst_drift_is_a_number(value: float) -> None:
    dense = torch.randn(6, 11, generator=torch.Generator().manual_seed(0))
    sparse = dense.clone()
    sparse[0, 3] = value
    drift = drift_of([compare(dense, sparse, torch.zeros(6, dtype=torch.long), 0)], 0.5)
    summary = drift.summary()
    assert all(np.isfinite(number) for number in summary.values())
    assert drift.kl.max() <= WORST and drift.nll.max() <= WORST
    assert summary["ppl_increase_bound"] > 1.0 or value == -float("inf")


def test_perplexities_end_at_a_number_that_json_has() -> None:
    drift = drift_of([torch.tensor([[WORST] * 4, [1.0] * 4, [WORST] * 4, [0.0] * 4, [0.0] * 4])], 0.5)
    assert np.log(drift.summary()["ppl"]) == pytest.approx(LARGEST_LOG)
    assert 1e300 <= Budget.parse("ppl=99%").cost(drift) < np.inf


@pytest.mark.parametrize("text", ["ppl=2%", "ppl=0.00001%", "kl=1e-9", "ppl=99.5%", "ppl=0.3%,kl=1e-9"])
def test_a_budget_can_be_read_from_what_it_says(text: str) -> None:
    assert Budget.parse(str(Budget.parse(text))).limits == pytest.approx(Budget.parse(text).limits, rel=1e-3)


def test_details_hold_nothing_that_json_does_not_have() -> None:
    assert plain({"a": (float("inf"), [float("nan"), 1.5, 2, "x", None])}) == {"a": [None, [None, 1.5, 2, "x", None]]}


# A comparison with NaN is false whichever way it is put, and no check may pass by it.


def test_drift_that_is_not_a_number_fails() -> None:
    numbers = {"ppl_increase": float("nan"), "ppl_increase_standard_error": 0.0, "kl": float("nan")}
    for limits in ({"ppl_increase": 0.02}, {"kl": 0.1}):
        assert not drift_check(numbers, limits).passed


def test_logits_that_are_not_finite_differ() -> None:
    wanted = np.full((2, 3), np.nan, np.float32)
    assert not compare_logits(wanted, wanted).max_abs <= 1e9
