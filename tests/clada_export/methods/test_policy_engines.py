"""Every policy end to end on a tiny model: calibrated, exported, verified, run; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from clada_export.artifact.manifest import read_manifest
from clada_export.decoder.ffn import find_eager_ffns
from clada_export.errors import UsageError
from clada_export.export_options import ExportOptions
from clada_export.methods import POLICIES, PolicySettings, get_policy
from clada_export.pipeline import export, verify_folder
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.tensors import PLAN_TENSORS
from clada_export.runtime import load_engine
from tests.tiny_models import ffn_names, tiny_model

Folder = Callable[[str], Path]
SETTINGS = PolicySettings(granule=8, rows=200)
OPTIONS = ExportOptions(sparsity=0.5, calibration_context=48, load_response=False, settings=SETTINGS)
STATIC = ("wanda", "sparsegpt")
ROUTED = tuple(name for name, policy in POLICIES.items() if policy.trained)


def options_for(policy: str) -> ExportOptions:
    # DejaVu predicts single neurons, and Lory's experts follow from the sparsity.
    settings = replace(SETTINGS, granule=None) if policy in ("dejavu", "lory") else SETTINGS
    return replace(OPTIONS, policy=policy, settings=settings)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "clada"])
def test_every_policy_exports_verifies_and_runs(policy: str, model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = export(model_folder("llama"), out, options_for(policy))
    plan, verification = result.plan, result.verification
    assert plan.policy == policy
    assert verification is not None and verification.passed
    names = [check.name for check in verification.checks]
    assert any("dense parity" in name for name in names) and any("sparse parity" in name for name in names)
    if policy not in STATIC:
        # Of few prompts; what a prompt picks by the relative rule depends on its length, which is another one in calibration.
        assert 0.1 < verification.drift["sparsity"] < 0.7
        assert 0.3 < plan.expected_sparsity < 0.7
    assert (out / PLAN_TENSORS).is_file() == (policy in ROUTED)
    assert SparsityPlan.from_dict(read_manifest(out).plan, folder=out).to_dict() == plan.to_dict()
    # A batch of ragged prompts gives each row what it gives alone: statistics and routers are of the row.
    engine = load_engine(out)
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12]]
    together = engine.generate(prompts, 8, eos_token_id=[])
    alone = [engine.generate([prompt], 8, eos_token_id=[]).tokens[0] for prompt in prompts]
    assert together.tokens == alone


def test_a_mask_of_the_prompt_stays(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    """Griffin: k of every layer, whatever the token; the load moves k."""
    export(model_folder("llama"), tmp_path / "out", replace(options_for("griffin"), verify=False))
    engine = load_engine(tmp_path / "out")
    ks = [int(layer["threshold"][0]) for layer in engine.manifest.plan["layers"]]
    made = engine.generate([[5, 6, 7, 8, 9, 10]], 8, eos_token_id=[])
    assert made.active is not None and (made.active == np.array(ks)).all()
    denser = engine.generate([[5, 6, 7, 8, 9, 10]], 8, eos_token_id=[], load=2.0)
    assert denser.active is not None and (denser.active > np.array(ks)).all()


@pytest.mark.parametrize("prune", ["wanda=0.5", pytest.param("sparsegpt=2:4", marks=pytest.mark.long), "wanda=neurons:0.25"])
def test_pruning_composes_with_a_dynamic_policy(prune: str, model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = export(model_folder("llama"), out, replace(OPTIONS, prune=prune, sparsity=0.4))
    assert result.verification is not None and result.verification.passed
    plan = result.plan
    assert plan.prune == prune and plan.policy == "clada"
    width = 72 if "neurons" in prune else 96
    assert [layer.width for layer in plan.layers] == [width] * len(ffn_names("llama"))
    assert plan.calibration.to_dict()["pruning"]["spec"] == prune
    weights = {item.name: list(item.dims) for item in onnx.load(out / "model.onnx", load_external_data=False).graph.initializer}
    assert all(shape[0] == width for name, shape in weights.items() if name.endswith(("w_in", "w_out")))
    # The same text prunes the same weights again; another one is refused.
    assert verify_folder(out, str(model_folder("llama"))).passed
    assert load_engine(out).generate([[5, 6, 7]], 4, eos_token_id=[]).tokens


def test_pruned_neurons_and_experts_compose(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    result = export(model_folder("llama"), tmp_path / "out", replace(options_for("moefication"), prune="wanda=neurons:0.25"))
    assert result.verification is not None and result.verification.passed
    layer = result.plan.layers[0]
    neurons = result.plan.tensors(layer).neurons
    assert layer.kept_neurons == 72 and layer.reordered
    assert neurons is not None and len(set(neurons.tolist())) == 72


def test_a_static_policy_keeps_a_budget(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    result = export(
        model_folder("llama"),
        tmp_path / "out",
        replace(OPTIONS, policy="wanda", sparsity=None, budget="kl=0.001", verify=False),
    )
    drift = result.plan.calibration.to_dict()["drift"]
    assert 0.0 < drift["kl_bound"] <= 0.001
    assert result.plan.prune is not None and result.plan.prune.startswith("wanda=0.")


def test_a_plan_with_routers_can_be_passed_back(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    first = export(model_folder("llama"), tmp_path / "a", replace(options_for("d2dmoe"), verify=False))
    first.plan.save(tmp_path / "plan.json")
    again = replace(OPTIONS, plan=tmp_path / "plan.json", verify=False)
    second = export(model_folder("llama"), tmp_path / "b", again)
    assert (tmp_path / "a" / "model.onnx.data").read_bytes() == (tmp_path / "b" / "model.onnx.data").read_bytes()
    assert second.plan.to_dict() == first.plan.to_dict()

    file = tmp_path / PLAN_TENSORS
    kept = file.read_bytes()
    arrays = load_file(file)
    save_file({**arrays, next(iter(arrays)): np.zeros_like(arrays[next(iter(arrays))])}, file)
    with pytest.raises(UsageError, match="they belong to another plan"):
        export(model_folder("llama"), tmp_path / "c", again)
    file.unlink()
    with pytest.raises(UsageError, match="it is missing; copy it beside the plan"):
        export(model_folder("llama"), tmp_path / "c", again)
    file.write_bytes(kept[:100])
    with pytest.raises(UsageError, match="not a safetensors file that can be read"):
        export(model_folder("llama"), tmp_path / "c", again)
    assert not (tmp_path / "c").exists()


def test_routers_of_another_model_are_refused(model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    plan = export(model_folder("llama"), tmp_path / "a", replace(options_for("d2dmoe"), verify=False)).plan
    plan.save(tmp_path / "plan.json")
    value = json.loads((tmp_path / "plan.json").read_text())
    wider = {**value, "layers": [{**layer, "hidden_size": 128} for layer in value["layers"]]}
    with pytest.raises(UsageError, match="takes 64 values and scores 12 granules; this layer has 128 and 12"):
        SparsityPlan.from_dict(wider, folder=tmp_path)
    renamed = {**value, "layers": [{**layer, "name": f"other.{layer['name']}"} for layer in value["layers"]]}
    with pytest.raises(UsageError, match="it belongs to another model"):
        SparsityPlan.from_dict(renamed, folder=tmp_path)


# --- what is refused ---


@pytest.mark.parametrize("policy", [name for name in ROUTED if name not in ("dejavu", "lory")])
def test_experts_that_do_not_divide_the_ffn(policy: str) -> None:
    ffns = find_eager_ffns(tiny_model("llama", 0)).found
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.down_proj has 96 neurons, which experts of 7 do not divide"):
        get_policy(policy, PolicySettings(granule=7)).check(ffns)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": PolicySettings(granule=0)}, "--granule 0 is out of range"),
        ({"settings": PolicySettings(allocation="fair")}, "--allocation 'fair' is unknown; known: cett"),
        ({"prune": "wanda"}, "pruning 'wanda' is not understood"),
        ({"prune": "wanda=1.5"}, "out of range"),
        ({"policy": "wanda", "prune": "sparsegpt=0.5"}, "prunes by itself"),
        ({"policy": "wanda", "settings": PolicySettings(pattern="4:2")}, "pattern 4:2 keeps everything"),
        ({"policy": "wanda", "sparsity": 0.3, "settings": PolicySettings(pattern="2:4")}, "is a sparsity of 0.5, not 0.3"),
        ({"policy": "wanda", "sparsity": None, "budget": "cett=0.2"}, "has no CETT budget"),
        (
            {"policy": "griffin", "sparsity": None, "budget": "kl=1e-9"},
            "no sparsity keeps the budget kl=1e-09: 2% already costs",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], said: str, model_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        export(model_folder("llama"), tmp_path / "out", replace(OPTIONS, **change))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("k", [0, 97, 0.5])
def test_a_k_out_of_range_is_refused(k: float, model_folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    plan = export(model_folder("llama"), tmp_path / "a", replace(options_for("griffin"), verify=False)).plan
    layers = tuple(replace(layer, threshold=(k,)) for layer in plan.layers)
    plan.with_layers(layers).save(tmp_path / "plan.json")
    with pytest.raises(UsageError, match="must be between 1 and 96"):
        SparsityPlan.load_file(tmp_path / "plan.json")
