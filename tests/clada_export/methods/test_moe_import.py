"""Checkpoints that are mixtures of experts already: what is loaded is the checkpoint, and so is the engine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from clada_export.cli import main, main_export
from clada_export.decoder.ffn import find_eager_ffns, plain_ffns
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import BackendError, UnsupportedModelError, UsageError
from clada_export.export_options import ExportOptions
from clada_export.methods import PolicySettings
from clada_export.pipeline import ExportResult, export, verify_folder
from clada_export.plan.plan import SparsityPlan
from clada_export.runtime import load_engine
from clada_export.source.load import load_source
from clada_export.source.mixtures import import_blocks, routed_mlps
from clada_export.verify.mixture import measure_mixture
from clada_export.verify.parity import dense_check
from clada_export.verify.precision import Rounding
from tests.moe_checkpoints import (
    CHOSEN,
    EXPERTS,
    HIDDEN,
    LAYERS,
    LLAMA_MOE,
    NEURONS,
    SIZE,
    write_granite_moe,
    write_llama_moe,
    write_text,
    write_tokenizer,
)
from tests.tiny_models import tiny_model

TOKENS = torch.tensor([[3, 17, 101, 5, 200, 44, 90, 12]])
OPTIONS = ExportOptions(calibration_context=48, load_response=False)
POLICIES = {"llama-moe": write_llama_moe, "ds-moe": write_granite_moe}
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The checkpoint that a policy imports, with a tokenizer."""
    made: dict[str, Path] = {}

    def make(policy: str) -> Path:
        if policy not in made:
            made[policy] = POLICIES[policy](tmp_path_factory.mktemp("mixtures") / policy)
            write_tokenizer(made[policy])
            write_text(made[policy].with_suffix(".txt"))
        return made[policy]

    return make


# --- the loaded model is the checkpoint ---


def gated_sum(x: Tensor, logits: Tensor, k: int, scale: float, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """A mixture's output, one row and one expert at a time."""
    rows = []
    for row, values in zip(x, logits.tolist(), strict=True):
        chosen = sorted(range(len(values)), key=lambda index: -values[index])[:k]
        shares = [math.exp(values[index]) for index in chosen]
        parts = [scale * share / sum(shares) * expert(index, row) for index, share in zip(chosen, shares, strict=True)]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def llama_moe_logits(folder: Path, gate_network: str, scales: list[float]) -> Tensor:
    """What the checkpoint computes: transformers' own Llama, its FFNs replaced by loops over the file's tensors."""
    weights = load_file(folder / "model.safetensors")
    config = LlamaConfig(**{key: value for key, value in LLAMA_MOE.items() if key not in ("model_type", "architectures")})
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: tensor for name, tensor in weights.items() if ".mlp." not in name}, strict=False)

    def mixture(index: int) -> Callable[[Any, Any, Any], Tensor]:
        def part(name: str) -> Tensor:
            return weights[f"model.layers.{index}.mlp.{name}"]

        def expert(number: int, x: Tensor) -> Tensor:
            gate, up, down = (part(f"calculator.experts.weight_{name}.{number}") for name in ("gate", "up", "down"))
            return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            x = args[0].reshape(-1, HIDDEN)
            if gate_network == "mlp":
                logits = torch.tanh(x @ part("gate.gate_network.0.weight").T) @ part("gate.gate_network.2.weight").T
            else:
                logits = x @ part("gate.gate_network.weight").T
            return gated_sum(x, logits, CHOSEN, scales[index], expert).reshape(output.shape)

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(mixture(index))
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("gate_network", ["mlp", "linear"])
def test_a_llama_moe_is_loaded_as_its_code_computes_it(gate_network: str, tmp_path: Path) -> None:
    folder = write_llama_moe(tmp_path / "tiny", gate_network=gate_network)
    source = load_source(str(folder))
    wanted = llama_moe_logits(folder, gate_network, LLAMA_MOE["score_scale_factor"])
    with torch.inference_mode():
        found = source.decoder.module(input_ids=TOKENS).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        with plain_ffns(source.decoder.module):
            assert (source.decoder.module(input_ids=TOKENS).logits - wanted).abs().max() > 0.1
        torch.testing.assert_close(source.decoder.module(input_ids=TOKENS).logits, found, rtol=0, atol=0)
    assert not source.decoder.module.training and not any(weight.requires_grad for weight in source.decoder.module.parameters())
    assert (source.kind, source.source_dtype) == ("folder", "float32")


def test_other_ways_to_write_a_llama_moe(tmp_path: Path) -> None:
    """One scale for all layers, defaults left out, bfloat16, several files, pickled, tied embeddings."""
    plain = write_llama_moe(tmp_path / "plain", score_scale_factor=2.0)
    found = load_source(str(plain))
    with torch.inference_mode():
        wanted = found.decoder.module(input_ids=TOKENS).logits
    torch.testing.assert_close(wanted, llama_moe_logits(plain, "mlp", [2.0] * LAYERS), rtol=1e-4, atol=1e-4)

    short = write_llama_moe(
        tmp_path / "short",
        score_scale_factor=2,
        drop=("gate_network", "gate_type", "gate_use_softmax", "size_experts", "calculator_type", "rms_norm_eps", "auto_map"),
        rms_norm_eps=1e-5,
    )
    edited = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**edited, "rms_norm_eps": 1e-5}))
    assert load_source(str(short)).weights_digest == found.weights_digest

    state = load_file(plain / "model.safetensors")
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    (plain / "model.safetensors").unlink()
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, plain / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_source(str(plain)).weights_digest == found.weights_digest

    for file in parts:
        (plain / file).unlink()
    (plain / "model.safetensors.index.json").unlink()
    torch.save(state, plain / "pytorch_model.bin")
    with pytest.raises(UsageError, match="--allow-pickle"):
        load_source(str(plain))
    assert load_source(str(plain), allow_pickle=True).weights_digest == found.weights_digest

    half = write_llama_moe(
        tmp_path / "half", change=lambda state: state.update({name: value.bfloat16() for name, value in state.items()})
    )
    source = load_source(str(half))
    assert source.source_dtype == "bfloat16"
    assert {weight.dtype for weight in source.decoder.module.parameters()} == {torch.float32}

    tied = write_llama_moe(
        tmp_path / "tied", change=lambda state: state.__delitem__("lm_head.weight"), tie_word_embeddings=True
    )
    model = load_source(str(tied)).decoder.module
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_rotary_embeddings_follow_the_checkpoints_code(tmp_path: Path) -> None:
    """Base 10000 whatever the config says; linear scaling divides the positions."""
    plain = load_source(str(write_llama_moe(tmp_path / "plain", rope_theta=5000.0))).decoder.module
    frequencies = plain.model.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, 10000.0 ** (-torch.arange(0, 16, 2) / 16))
    scaled = load_source(
        str(write_llama_moe(tmp_path / "scaled", rope_scaling={"type": "linear", "factor": 2.0}))
    ).decoder.module
    torch.testing.assert_close(scaled.model.rotary_emb.inv_freq, frequencies / 2)


def test_a_granite_moe_keeps_its_numbers(folder: Folder) -> None:
    path = folder("ds-moe")
    source = load_source(str(path))
    original = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.inference_mode():
        wanted = original(input_ids=TOKENS).logits
        torch.testing.assert_close(source.decoder.module(input_ids=TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert list(routed_mlps(source.decoder.module)) == [f"model.layers.{i}.block_sparse_moe.down_proj" for i in range(LAYERS)]


def test_a_granite_block_is_the_formula(folder: Folder) -> None:
    weights = load_file(folder("ds-moe") / "model.safetensors")
    mixture = load_source(str(folder("ds-moe"))).decoder.module.get_submodule("model.layers.1.block_sparse_moe")
    router, inputs, down = (
        weights[f"model.layers.1.block_sparse_moe.{name}.weight"] for name in ("router.layer", "input_linear", "output_linear")
    )

    def expert(number: int, x: Tensor) -> Tensor:
        gate, up = (inputs[number] @ x).chunk(2)
        return down[number] @ (torch.nn.functional.silu(gate) * up)

    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    rows = x.reshape(-1, HIDDEN)
    wanted = gated_sum(rows, rows @ router.T, CHOSEN, 1.0, expert).reshape(x.shape)
    torch.testing.assert_close(mixture(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_mixtures_are_found_as_gated_ffns(policy: str, folder: Folder) -> None:
    model = load_source(str(folder(policy))).decoder.module
    ffns = find_eager_ffns(model)
    assert [ffn.name for ffn in ffns.found] == list(routed_mlps(model)) and ffns.skipped == ()
    sizes = {(ffn.gated, ffn.hidden_size, ffn.intermediate_size, ffn.activation) for ffn in ffns.found}
    assert sizes == {(True, HIDDEN, NEURONS, "silu")}


def test_the_digest_covers_the_router(folder: Folder, tmp_path: Path) -> None:
    def nudge(state: dict[str, Tensor]) -> None:
        state["model.layers.1.mlp.gate.gate_network.2.weight"][0, 0] += 1.0

    other = write_llama_moe(tmp_path / "other", change=nudge)
    assert load_source(str(other)).weights_digest != load_source(str(folder("llama-moe"))).weights_digest


def test_no_code_of_the_checkpoint_runs(tmp_path: Path) -> None:
    path = write_llama_moe(tmp_path / "tiny")
    for name in ("configuration_llama_moe", "modeling_llama_moe_hf"):
        (path / f"{name}.py").write_text("raise SystemExit('ran')\n")
    for trusted in (False, True):
        assert routed_mlps(load_source(str(path), trust_remote_code=trusted).decoder.module)


# --- what is no such mixture stays as it is ---


def test_mixtral_stays_as_it_is() -> None:
    model = tiny_model("mixtral")
    assert import_blocks(model) == () and not routed_mlps(model)
    assert "routed experts are left dense" in find_eager_ffns(model).skipped[0].reason


class Block(nn.Module):
    """A block with the attributes of the layout; `sigmoid` gates in another way, `shared` adds what all tokens take."""

    def __init__(self, sigmoid: bool = False, shared: bool = False, broken: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3, bias=False)
        self.router.top_k = 2  # type: ignore[assignment]
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(3, 8, 8))
        self.experts.down_proj = nn.Parameter(torch.randn(3, 8, 4))
        self.experts.act_fn = torch.nn.functional.silu
        self.shared = nn.Linear(8, 8) if shared else None
        self.sigmoid, self.broken = sigmoid, broken

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            raise RuntimeError("this block wants more than x")
        best, places = self.router(x).topk(2)
        scores = best.sigmoid() if self.sigmoid else best.softmax(-1)
        gate, up = torch.einsum("bsd,ehd->bseh", x, self.experts.gate_up_proj).chunk(2, dim=-1)
        y = torch.einsum("bsef,edf->bsed", self.experts.act_fn(gate) * up, self.experts.down_proj)
        picked = y.gather(2, places.unsqueeze(-1).expand(*places.shape, 8))
        result = (picked * scores.unsqueeze(-1)).sum(2)
        return result if self.shared is None else result + self.shared(x)


@pytest.mark.parametrize(
    ("settings", "imported"), [({}, True), ({"sigmoid": True}, False), ({"shared": True}, False), ({"broken": True}, False)]
)
def test_a_block_is_taken_only_if_its_numbers_are_the_mixture(settings: dict[str, bool], imported: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(**settings))
    before = model[0]
    x = torch.randn(2, 6, 8)
    wanted = None if settings.get("broken") else before(x)
    assert import_blocks(model) == (("0",) if imported else ())
    assert (model[0] is before) is not imported
    if wanted is not None:
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


# --- exports ---


def exported(policy: str, folder: Folder, out: Path, /, **changes: Any) -> ExportResult:
    text = folder(policy).with_suffix(".txt")
    return export(folder(policy), out, replace(OPTIONS, **{"policy": policy, "calibration_data": text, **changes}))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_engine_is_the_checkpoint(policy: str, folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    result = exported(policy, folder, tmp_path / "out")
    assert result.verification is not None and result.verification.passed
    plan = result.plan
    assert (plan.policy, plan.score, plan.rule, str(plan.calibration.goal)) == (policy, "external", "topk", "imported")
    for layer in plan.layers:
        assert (layer.granule, layer.threshold, layer.combine) == (SIZE, (float(CHOSEN),), "weighted")
        assert layer.router is not None and (layer.router.output, layer.router.k) == ("topk_softmax", CHOSEN)
        assert layer.router.dense_rows == "scores"
        assert layer.expected_sparsity == pytest.approx(1 - CHOSEN / EXPERTS)
    drift = result.manifest.drift
    assert drift["kl"] < 1e-6 and drift["top1"] == 1.0 and drift["mean_load"] == 0.0
    assert drift["sparsity"] == pytest.approx(1 - CHOSEN / EXPERTS)

    model = load_source(str(folder(policy))).decoder.module
    engine = load_engine(tmp_path / "out")
    row = TOKENS[0].tolist()
    wanted = TorchDecoder(model).dense_logits(row)
    for load in ("dense", 0.0, 3.0):
        np.testing.assert_allclose(engine.logits([row], load)[0], wanted, rtol=1e-4, atol=3e-4)
    # Fewer experts than the checkpoint chose are another model.
    assert np.abs(engine.logits([row], -4.0)[0] - wanted).max() > 0.01
    for load, experts in ((3.0, CHOSEN), (0.0, CHOSEN), (-4.0, 1)):
        engine.prefill([row])
        output = engine.step([7], load)
        assert output.active is not None and (output.active == experts * SIZE).all()
    with torch.inference_mode():
        greedy = model.generate(TOKENS, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, len(row) :].tolist()
    assert engine.generate([row], 12, eos_token_id=[]).tokens[0] == greedy
    assert verify_folder(tmp_path / "out", str(folder(policy)), calibration_data=folder(policy).with_suffix(".txt")).passed


@pytest.mark.parametrize("policy", ["llama-moe", pytest.param("ds-moe", marks=pytest.mark.long)])
def test_reduced_weights(policy: str, folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    result = exported(policy, folder, tmp_path / "out", dtype="bfloat16")
    assert result.verification is not None and result.verification.passed
    assert result.manifest.drift["kl"] < 1e-6


def test_the_command_line(folder: Folder, kept_traces: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    path = str(folder("llama-moe"))
    arguments = [path, "--target", "ort", "-o", str(out), "--calibration-context", "48", "--quiet"]
    arguments += ["--calibration-data", f"{path}.txt"]
    assert main_export([*arguments, "--policy", "clada"]) == 2
    assert "is a mixture of experts already (LLaMA-MoE v1)" in (said := capsys.readouterr().err)
    assert "--policy llama-moe" in said and not out.exists()
    assert main_export([*arguments, "--policy", "llama-moe", "--sparsity", "0.5"]) == 0
    assert "--sparsity: without effect" in "\n".join(json.loads((out / "clada.json").read_text())["warnings"])
    capsys.readouterr()
    assert main(["run", str(out), "--prompt", "w3 w17 w101", "--max-new-tokens", "5", "--quiet"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["inspect", str(out)]) == 0
    assert "llama-moe" in capsys.readouterr().out


def test_tensorrt(folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed")
    from clada_export.native.library import trt_library_path
    from clada_export.targets.options import TensorRTOptions

    try:
        trt_library_path()
    except BackendError as error:
        pytest.skip(f"the plugin library is not built: {error}")
    settings = TensorRTOptions(max_batch=2, compute_capabilities=("8.9",))
    result = exported("llama-moe", folder, tmp_path / "out", target="trt", tensorrt=settings, dtype="bfloat16")
    assert result.verification is not None and result.verification.passed


def test_options_without_effect_are_named(folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    def warned(name: str, **changes: Any) -> str:
        result = exported("ds-moe", folder, tmp_path / name, verify=False, **changes)
        return "\n".join(text for text in result.manifest.warnings if "without effect" in text)

    assert warned("plain") == ""
    assert warned("auto", policy="auto") == ""
    said = warned("given", budget="kl=0.05", settings=PolicySettings(granule=8, score="gate"))
    assert said.startswith("--budget, --granule, --score: without effect")


def test_the_plan_can_be_given_back(folder: Folder, kept_traces: None, tmp_path: Path) -> None:
    first = exported("llama-moe", folder, tmp_path / "a", verify=False)
    first.plan.save(tmp_path / "plan.json")
    again = exported("llama-moe", folder, tmp_path / "b", plan=tmp_path / "plan.json")
    assert again.plan == first.plan and again.verification is not None and again.verification.passed
    first.plan.with_layers(first.plan.layers[:1]).save(tmp_path / "plan.json")
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.down_proj: this mixture .* is not in the plan"):
        exported("llama-moe", folder, tmp_path / "c", plan=tmp_path / "plan.json")
    value = first.plan.to_dict()
    value["layers"][0]["router"]["k"] = EXPERTS + 1
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(UsageError, match=f"router with k {EXPERTS + 1};"):
        SparsityPlan.load_file(tmp_path / "plan.json")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": "griffin"}, "policy 'griffin' would choose neurons of a dense model; give --policy {policy}"),
        ({"policy": "{other}"}, "policy '{other}' would choose .* give --policy {policy}"),
        ({"prune": "wanda=0.5"}, "--prune wanda=0.5 is for dense models"),
    ],
)
def test_what_an_imported_mixture_refuses(
    policy: str, changes: dict[str, str], said: str, folder: Folder, tmp_path: Path
) -> None:
    names = {"policy": policy, "other": next(name for name in POLICIES if name != policy)}
    options = replace(OPTIONS, **{"policy": policy, **{key: value.format(**names) for key, value in changes.items()}})
    with pytest.raises(UsageError, match=said.format(**names)):
        export(folder(policy), tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("policy", "rewritten"),
    [("clada", "shared_mlp"), pytest.param("ds-moe", "block_sparse_moe", marks=pytest.mark.long)],
)
def test_a_shared_expert_is_an_ffn_beside_the_routed_ones(policy: str, rewritten: str, tmp_path: Path) -> None:
    model = write_granite_moe(tmp_path / "model", shared_intermediate_size=48)
    result = export(model, tmp_path / "out", replace(OPTIONS, policy=policy, sparsity=0.3, calibration_cache=None))
    assert result.verification is not None and result.verification.passed
    assert [layer.name.split(".")[3] for layer in result.plan.layers] == [rewritten] * LAYERS
    left = "block_sparse_moe" if policy == "clada" else "shared_mlp"
    assert sum(left in warning and "left dense" in warning for warning in result.manifest.warnings) == LAYERS
    assert verify_folder(tmp_path / "out", source=str(model)).passed


# --- what rounding may cost ---


def test_rounding_of_a_mixture_is_measured(folder: Folder) -> None:
    decoder = load_source(str(folder("llama-moe"))).decoder
    row = TOKENS[0].tolist()
    before = decoder.dense_logits(row)
    found = measure_mixture(decoder, row)
    assert found is not None and found.settled == len(row)
    assert 0.0 < found.logits < 1e-4
    np.testing.assert_array_equal(decoder.dense_logits(row), before)
    assert measure_mixture(TorchDecoder(tiny_model("llama")), row) is None


@pytest.mark.parametrize("chosen", [CHOSEN, EXPERTS])
def test_experts_that_tie_are_found(chosen: int, tmp_path: Path) -> None:
    def same(state: dict[str, Tensor]) -> None:
        weight = state["model.layers.1.mlp.gate.gate_network.weight"]
        weight[:] = weight[0]

    path = write_llama_moe(tmp_path / "tiny", gate_network="linear", num_selects=chosen, change=same)
    found = measure_mixture(load_source(str(path)).decoder, TOKENS[0].tolist())
    assert found is not None
    assert found.settled == (0 if chosen < EXPERTS else TOKENS.shape[1])  # with all of them there is no choice


def test_positions_after_a_tie_are_held_to_a_mean_kl() -> None:
    wanted = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    near, far = wanted.copy(), wanted.copy()
    near[4] += np.linspace(0, 0.05, 50, dtype=np.float32)
    far[4] = -far[4]
    allowed = Rounding(sparse_kl=0.02)
    assert dense_check("x", [wanted], [wanted]).passed
    assert not dense_check("x", [near], [wanted], allowed, [6]).passed
    assert dense_check("x", [near], [wanted], allowed, [4]).passed
    check = dense_check("x", [far], [wanted], allowed, [4])
    assert not check.passed and "after a tie of experts, KL is" in check.why
    assert not dense_check("x", [near * np.nan], [wanted], allowed, [0]).passed
