"""Fine-tuning: adapters on weights, their training through the model, and engines made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from clada_export.artifact.manifest import read_manifest
from clada_export.calibration.drift import DriftMeter
from clada_export.calibration.weights import FFNWeights
from clada_export.decoder.ffn import EagerFFN, find_eager_ffns
from clada_export.decoder.tap import FFNTap
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UsageError
from clada_export.export_options import ExportOptions
from clada_export.methods import PolicySettings
from clada_export.methods.lte.finetune import Finetuned, FinetuneSettings, RoutedFFN, finetune
from clada_export.methods.static import WeightPruning
from clada_export.methods.training.cluster import cluster_neurons
from clada_export.pipeline import export, verify_folder
from clada_export.plan.adapters import adapted_weights, apply_adapters, require_own_weights
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.tensors import PLAN_TENSORS, LayerTensors
from graph_passes.router import Router
from tests.tiny_models import KINDS, tiny_model

Folder = Callable[[str], Path]
WINDOWS = torch.randint(3, 256, (4, 48), generator=torch.Generator().manual_seed(1))
PROMPT, GRANULE = 8, 8
SETTINGS = PolicySettings(granule=GRANULE, rows=200, finetune=True)
OPTIONS = ExportOptions(policy="lte", sparsity=0.5, calibration_context=48, load_response=False, settings=SETTINGS)


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def adapters_for(ffns: list[EagerFFN] | tuple[EagerFFN, ...], rank: int = 3) -> dict[str, LayerTensors]:
    rng = np.random.default_rng(2)

    def pair(shape: torch.Size) -> tuple[np.ndarray, np.ndarray]:
        m, n = shape
        return rng.normal(size=(m, rank)).astype(np.float32), rng.normal(size=(rank, n)).astype(np.float32)

    return {ffn.name: LayerTensors(adapters=tuple(pair(item.weight.shape) for item in adapted_weights(ffn))) for ffn in ffns}


def routed(ffns: list[EagerFFN] | tuple[EagerFFN, ...]) -> list[RoutedFFN]:
    """Random routers over clustered experts."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for ffn in ffns:
        experts = ffn.intermediate_size // GRANULE
        weight = torch.randn(experts, ffn.hidden_size, generator=generator).numpy() * 0.1
        router = Router((weight,), (np.zeros(experts, dtype=np.float32),))
        found.append(RoutedFFN(ffn, router, cluster_neurons(ffn.w_in(), GRANULE, 0, name=ffn.name), GRANULE))
    return found


# --- adapters ---


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_added_and_taken_away(kind: str) -> None:
    model = tiny_model(kind)
    ffns = find_eager_ffns(model).found
    before, arrays = state(model), adapters_for(ffns)
    items = adapted_weights(ffns[0])
    old = [item.weight.detach().clone() for item in items]
    calls = []
    weights = FFNWeights(TorchDecoder(model), WINDOWS, lambda: calls.append(1))
    weights.adapt(arrays)
    assert weights.adapted and calls == [1]
    for item, was, (left, right) in zip(items, old, arrays[ffns[0].name].adapters, strict=True):
        torch.testing.assert_close(item.weight - was, torch.from_numpy(left @ right), rtol=1e-4, atol=1e-5)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert len(changed) == sum(len(adapted_weights(ffn)) for ffn in ffns)
    weights.use(None)
    assert not weights.adapted and equal(state(model), before)


def test_weights_go_from_one_state_to_another() -> None:
    model = tiny_model("llama")
    ffns = find_eager_ffns(model).found
    before, arrays = state(model), adapters_for(ffns)
    weights = FFNWeights(TorchDecoder(model), WINDOWS)
    weights.adapt(arrays)
    weights.use(WeightPruning.parse("wanda=0.5"))
    pruned = state(model)
    assert not weights.adapted and weights.pruning is not None
    weights.use(None)
    weights.adapt(arrays)
    weights.use(WeightPruning.parse("wanda=0.5"))
    assert equal(state(model), pruned)
    weights.use(None)
    weights.adapt({})
    assert not weights.adapted and equal(state(model), before)


def test_adapters_of_another_model_change_nothing() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", hidden_size=32, head_dim=8)
    before = state(model)
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.down_proj: the adapters are for weights of shapes .*another model"):
        apply_adapters(find_eager_ffns(model).found, adapters_for(find_eager_ffns(other).found))
    assert equal(state(model), before)


def test_shared_weights_are_refused() -> None:
    model = tiny_model("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    second.down_proj.weight = first.down_proj.weight
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.down_proj and model\.layers\.1\.mlp\.down_proj share"):
        require_own_weights(find_eager_ffns(model).found)


# --- training ---


def train(model: torch.nn.Module, windows: Tensor = WINDOWS, **settings: float) -> Finetuned:
    ffns = find_eager_ffns(model).found
    chosen = replace(FinetuneSettings(epochs=6, learning_rate=3e-3, router_rate=3e-3, patience=6), **settings)
    return finetune(TorchDecoder(model), routed(ffns), windows, PROMPT, 0.5, chosen)


@pytest.mark.parametrize("kind", ["llama", "phi3", "opt", "gpt2"])
def test_training_brings_the_sparse_model_nearer(kind: str) -> None:
    model = tiny_model(kind)
    ffns = find_eager_ffns(model).found
    model.lm_head.weight.requires_grad_(False)
    flags = [item.requires_grad for item in model.parameters()]
    before = state(model)
    # One text, so that what is learned on three windows holds on the fourth.
    windows = WINDOWS[:1].repeat(4, 1)
    found = train(model, windows)
    assert found.kl_after < 0.8 * found.kl_before
    assert found.losses[-1] < found.losses[0]
    # The model is as it was, down to which parameters take gradients.
    assert equal(state(model), before) and [item.requires_grad for item in model.parameters()] == flags

    # What is reported is what the adapters and routers do, measured by other means.
    meter = DriftMeter(TorchDecoder(model), windows[:1], PROMPT)
    arrays = {ffn.name: LayerTensors(adapters=pairs) for ffn, pairs in zip(ffns, found.adapters, strict=True)}
    layers = routed(ffns)
    weights = FFNWeights(TorchDecoder(model), windows)
    weights.adapt(arrays)
    shares: list[float] = []

    def inner(index: int, x: Tensor, h: Tensor) -> Tensor:
        router, neurons = found.routers[index], layers[index].neurons
        assert neurons is not None
        (weight,), (bias,) = router.weights, router.biases
        assert bias is not None
        gate = torch.sigmoid(x.reshape(-1, x.shape[-1]) @ torch.from_numpy(weight).t() + torch.from_numpy(bias)) > 0.5
        mask = torch.zeros(len(gate), ffns[index].intermediate_size)
        mask[:, torch.from_numpy(neurons)] = gate.float().repeat_interleave(GRANULE, dim=1)
        mask[:PROMPT] = 1.0
        shares.append(1.0 - float(mask[PROMPT:].mean()))
        return h * mask.reshape(h.shape)

    drift = meter.through(lambda current: FFNTap(ffns, inner=inner))
    # The drift leaves out the last token, whose next one is not known.
    assert drift.mean_kl == pytest.approx(found.kl_after, rel=0.15)
    assert shares == pytest.approx([0.5] * len(shares), abs=0.03)


def test_training_is_repeatable_and_never_ends_worse() -> None:
    first, second = train(tiny_model("llama")), train(tiny_model("llama"))
    assert first.kl_after == second.kl_after
    assert all(
        np.array_equal(a, b)
        for one, two in zip(first.adapters, second.adapters, strict=True)
        for pair, other in zip(one, two, strict=True)
        for a, b in zip(pair, other, strict=True)
    )
    # At such a rate every epoch is worse than none: what there was is kept.
    wild = train(tiny_model("llama"), learning_rate=10.0, router_rate=10.0, patience=2)
    assert wild.kl_after == wild.kl_before and wild.epochs == 2
    assert all(not left.any() for pairs in wild.adapters for left, _ in pairs)


def test_one_window_is_not_enough() -> None:
    with pytest.raises(UsageError, match="at least two calibration windows"):
        train(tiny_model("llama"), WINDOWS[:1])


# --- engines ---


def test_a_finetuned_engine(model_folder: Folder, tmp_path: Path) -> None:
    options = replace(OPTIONS, calibration_cache=tmp_path / "cache")
    result = export(model_folder("llama"), tmp_path / "a", options)
    plan = result.plan
    assert result.verification is not None and result.verification.passed
    assert {layer.adapter_rank for layer in plan.layers} == {8}
    assert plan.calibration.details["training"]["finetuning"]["epochs"] >= 1
    names = set(load_file(tmp_path / "a" / PLAN_TENSORS))
    assert {f"{layer.name}.adapter.{index}.left" for layer in plan.layers for index in range(3)} <= names
    assert SparsityPlan.from_dict(read_manifest(tmp_path / "a").plan, folder=tmp_path / "a").to_dict() == plan.to_dict()
    # The weights are not in the source: whoever verifies later takes them from the plan.
    assert verify_folder(tmp_path / "a", str(model_folder("llama"))).passed

    # The cache gives the same again; so does the plan alone.
    again = export(model_folder("llama"), tmp_path / "b", replace(options, verify=False))
    plan.save(tmp_path / "plan.json")
    given = replace(OPTIONS, plan=tmp_path / "plan.json", settings=PolicySettings(), verify=False)
    export(model_folder("llama"), tmp_path / "c", given)
    data = [(tmp_path / name / "model.onnx.data").read_bytes() for name in "abc"]
    assert data[0] == data[1] == data[2] and again.plan.to_dict() == plan.to_dict()

    file = tmp_path / PLAN_TENSORS
    arrays = load_file(file)
    name = f"{plan.layers[0].name}.adapter.0.right"
    save_file({key: value for key, value in arrays.items() if key != name}, file)
    with pytest.raises(UsageError, match="they belong to another plan"):
        SparsityPlan.load_file(tmp_path / "plan.json")


@pytest.mark.long
def test_a_finetuned_engine_in_bfloat16(model_folder: Folder, tmp_path: Path) -> None:
    result = export(model_folder("llama"), tmp_path / "out", replace(OPTIONS, dtype="bfloat16"))
    assert result.verification is not None and result.verification.passed
    assert verify_folder(tmp_path / "out", str(model_folder("llama"))).passed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policy": "cats"}, "policy 'cats' does not train the model's weights; use --policy lte"),
        ({"policy": "wanda"}, "policy 'wanda' does not train"),
        ({"prune": "wanda=0.5"}, "--finetune and --prune exclude each other"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], said: str, model_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        export(model_folder("llama"), tmp_path / "out", replace(OPTIONS, **change))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
