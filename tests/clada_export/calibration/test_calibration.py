"""Calibration: text, tables, allocation, budget search, load response, and the plan that comes out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.tiny_decoders import tiny_decoder
from clada_export.calibration import Budget, CalibrationOptions, calibrate, load_calibration_data
from clada_export.calibration.allocation import ALLOCATIONS, Layers, allocate
from clada_export.calibration.axis import AXES
from clada_export.calibration.drift import DriftMeter
from clada_export.calibration.selector import MethodSelectors, Selectors
from clada_export.calibration.sensitivity import layer_sensitivity
from clada_export.calibration.statistics import collect_statistics
from clada_export.calibration.text import default_text, make_windows, read_text, read_tokens
from clada_export.decoder.ffn import EagerFFN, find_eager_ffns
from clada_export.decoder.tap import FFNTap
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UsageError
from clada_export.methods import POLICIES, PolicySettings, get_policy
from clada_export.op.reference import neuron_outputs, neuron_scores, sparse_ffn
from clada_export.op.scorer import LayerScorer, layer_attributes, layer_tensors
from clada_export.plan.method import Method, draft_layers
from clada_export.plan.plan import SparsityPlan
from clada_export.verify.eager import ReferenceModel
from tests.tiny_models import tiny_model

CONTEXT = 32


def windows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 256, (count, CONTEXT), generator=torch.Generator().manual_seed(seed))


# --- text ---


@given(st.integers(2, 40), st.integers(1, 8), st.integers(1, 8))
def test_windows_are_disjoint_and_cover_both_parts(count: int, calibration: int, heldout: int) -> None:
    ids = np.arange(count * 8 + 3)
    data = make_windows(ids, 8, calibration, heldout, "text")
    firsts = [row[0].item() for row in (*data.calibration, *data.heldout)]
    assert len(set(firsts)) == len(firsts) <= calibration + heldout
    assert 1 <= len(data.heldout) <= heldout
    assert 1 <= len(data.calibration) <= max(calibration, count - 1)
    assert len(firsts) == min(count, calibration + heldout)


def test_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match="100 tokens; calibration needs at least two windows of 64"):
        make_windows(np.arange(100), 64, 4, 2, "notes.txt")


@pytest.mark.parametrize(("content", "said"), [(b"", "empty"), (b" \n ", "empty"), (b"\xff\xfe\x00", "UTF-8")])
def test_texts_that_are_none(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read_text(path)
    with pytest.raises(UsageError, match="can't be read"):
        read_text(tmp_path / "missing")


def test_tokens_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(6, dtype=np.int32).reshape(2, 3))
    assert read_tokens(path, 10).tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(UsageError, match="ids from 0 to 5; the model has 0 to 3"):
        read_tokens(path, 4)
    np.save(path, np.zeros(3))
    with pytest.raises(UsageError, match="float64"):
        read_tokens(path, 4)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"tokens\.npy: not a file of token ids: .*Python objects"):
        read_tokens(path, 4)
    np.savez(tmp_path / "tokens.npz", np.arange(3))
    with pytest.raises(UsageError, match="an archive of arrays"):
        read_tokens(tmp_path / "tokens.npz", 4)
    np.save(path, np.array([1, 2**64 - 1], dtype=np.uint64))
    with pytest.raises(UsageError, match=f"ids from 1 to {2**64 - 1}"):
        read_tokens(path, 4)
    np.save(path, np.zeros((0, 3), dtype=np.int32))
    with pytest.raises(UsageError, match="it is empty"):
        read_tokens(path, 4)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((10**12,), "mmap length is greater than file size"),
        ((2**62, 2**62), "not a file of token ids"),
        ((-3,), "not a file of"),
    ],
)
def test_token_files_that_claim_more_than_they_have(tmp_path: Path, shape: tuple[int, ...], said: str) -> None:
    path = tmp_path / "tokens.npy"
    header = str({"descr": "<i8", "fortran_order": False, "shape": shape}).ljust(117).encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64))
    with pytest.raises(UsageError, match=said):
        read_tokens(path, 100)


@pytest.mark.parametrize("read", [read_text, lambda path: read_tokens(path, 100)])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop", ".", "a\0b", "missing", "x" * 300):
        with pytest.raises(UsageError, match="can't be read"):
            read(tmp_path / name)


def test_a_tokenizer_that_fails_on_the_text_is_named(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"a": 0}, unk_token="missing"))
    with pytest.raises(UsageError, match=r"pydoc_data\.topics: the tokenizer fails on this text: .*Missing .UNK."):
        load_calibration_data(PreTrainedTokenizerFast(tokenizer_object=words), 100)


def test_random_tokens_carry_a_warning() -> None:
    data = load_calibration_data(None, 100, context=16)
    assert "random tokens" in data.warnings[0]
    assert load_calibration_data(None, 100, context=16).digest == data.digest
    with pytest.raises(UsageError, match="--calibration-tokens"):
        load_calibration_data(None, 100, text_file=Path("text"))


def test_the_default_text_is_prose() -> None:
    assert len(default_text()) > 300_000


# --- statistics ---


def selectors_of(ffns: tuple[EagerFFN, ...], score: str = "gate") -> Selectors:
    return Selectors(ffns, (Method("test", score, "threshold", draft_layers(ffns)),))


@pytest.mark.parametrize(("kind", "score"), [("llama", "shadow"), ("llama", "gate"), ("gpt2", "exact"), ("opt", "gate")])
def test_tables_equal_brute_force(kind: str, score: str) -> None:
    model = tiny_model(kind, 0)
    ffns = find_eager_ffns(model).found
    scorers = [LayerScorer(ffn, score) for ffn in ffns]
    data = windows(3)
    tables = collect_statistics(TorchDecoder(model), selectors_of(ffns, score), data).tables[0]
    scores: list[list[torch.Tensor]] = [[] for _ in ffns]
    errors: list[list[float]] = [[] for _ in ffns]
    middle = [float(table.coarse_level[len(table.coarse_level) // 2]) for table in tables]

    def inner(index: int, x: torch.Tensor, h: torch.Tensor) -> None:
        score = scorers[index](x, h).reshape(-1, h.shape[-1])
        scores[index].append(score)
        flat = h.reshape(-1, h.shape[-1])
        rows = torch.linspace(0, len(flat) - 1, min(24, len(flat))).long()
        dropped = torch.where(score[rows] < middle[index], flat[rows], torch.zeros(()))
        w_out = ffns[index].w_out()
        errors[index] += ((dropped @ w_out).norm(dim=-1) / (flat[rows] @ w_out).norm(dim=-1)).tolist()

    with torch.inference_mode(), FFNTap(ffns, inner=inner):
        for window in data:
            model(input_ids=window[None], use_cache=False)
    for index, table in enumerate(tables):
        everything = torch.cat(scores[index])
        for place in (3, 20, 50):
            share = float((everything.double() < table.level[place]).double().mean())
            assert table.sparsity[place] == pytest.approx(share, abs=2e-3)
        assert table.cett_at(middle[index]) == pytest.approx(np.mean(errors[index]), rel=1e-4)
        assert bool((np.diff(table.level) > 0).all())
        assert bool((np.diff(table.cett) >= 0).all())
        target = float(table.cett[-1]) / 2
        assert table.cett_at(table.level_for_cett(target)) <= target * (1 + 1e-9)


def test_the_load_statistics_are_those_of_the_text() -> None:
    model = tiny_model("llama", 0)
    ffns = find_eager_ffns(model).found
    data = windows(2)
    load = collect_statistics(TorchDecoder(model), selectors_of(ffns), data).load
    surprisals = []
    with torch.no_grad():
        for window in data:
            log_p = model(input_ids=window[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            surprisals += (-log_p.gather(1, window[1:, None])).flatten().tolist()
    assert load.surprisal_mean == pytest.approx(np.mean(surprisals), rel=1e-5)
    assert load.surprisal_std == pytest.approx(np.std(surprisals), rel=1e-3)


def test_nan_activations_name_the_layer() -> None:
    model = tiny_model("llama", 0)
    ffns = find_eager_ffns(model).found
    selectors = selectors_of(ffns)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.down_proj: the activations are not finite"):
        collect_statistics(TorchDecoder(model), selectors, windows(1))


def test_sensitivity_predicts_kl() -> None:
    """1/2 s^2 |e|^2 is the KL of a small random error e in one layer's output, within what the isotropic model allows."""
    model = tiny_model("llama", 0)
    ffns = find_eager_ffns(model).found
    data = windows(8)
    price = layer_sensitivity(TorchDecoder(model), data)
    scale = 0.02
    assert all(parameter.grad is None for parameter in model.parameters())
    for layer in range(len(ffns)):
        generator = torch.Generator().manual_seed(1)

        def outer(index: int, y: torch.Tensor, layer: int = layer, generator: torch.Generator = generator) -> torch.Tensor:
            noise = torch.randn(y.shape, generator=generator) * scale
            return y + noise if index == layer else y

        kl = 0.0
        with torch.no_grad():
            for window in data:
                dense = model(input_ids=window[None], use_cache=False).logits[0].log_softmax(-1)
                with FFNTap(ffns, outer=outer):
                    noisy = model(input_ids=window[None], use_cache=False).logits[0].log_softmax(-1)
                kl += float((dense.exp() * (dense - noisy)).sum(-1).mean()) / len(data)
        # Noise in earlier tokens reaches later ones through attention, so the gradient of one token's loss alone falls short.
        predicted = 0.5 * price[layer] ** 2 * scale**2 * ffns[layer].hidden_size
        assert predicted == pytest.approx(kl, rel=0.6)


def test_sensitivity_of_a_model_that_adds_to_an_ffn_in_place() -> None:
    """Falcon sums its parallel branches in place: the gradient is that of the FFN's own output, and the sum is unharmed."""
    model = tiny_decoder("falcon").eval()
    ffns = find_eager_ffns(model).found
    ids = torch.arange(64).reshape(2, 32) % model.config.vocab_size
    before = model(input_ids=ids, use_cache=False).logits.detach()
    price = layer_sensitivity(TorchDecoder(model), list(ids))
    assert len(price) == len(ffns) and all(np.isfinite(price)) and min(price) > 0
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


# --- allocation ---


METHODS = [
    ("shadow", "threshold", 1),
    ("exact", "relative", 1),
    ("gate", "topk", 1),
    ("prefix", "topk", 4),
    ("prefix", "relative", 1),
]


def _layers(score: str, rule: str, granule: int) -> Layers:
    model = tiny_model("llama", 0)
    ffns = find_eager_ffns(model).found
    method = Method("test", score, rule, draft_layers(ffns, granule=granule))
    tables = collect_statistics(TorchDecoder(model), Selectors(ffns, (method,)), windows(2), prompt=8).tables[0]
    return Layers(AXES[rule], tables, tuple(ffn.intermediate_size for ffn in ffns), (2.0, 0.5))


@pytest.mark.parametrize(("score", "rule", "granule"), METHODS)
@pytest.mark.parametrize("wanted", [0.1, 0.45, 0.8])
def test_allocations_meet_the_mean_sparsity(wanted: float, score: str, rule: str, granule: int) -> None:
    layers = _layers(score, rule, granule)
    multiplier = np.exp(np.linspace(-0.2, 0.2, 11))
    for name in set(ALLOCATIONS) - {"dense"}:
        allocation = allocate(name, layers)
        levels = allocation.levels_for(wanted)
        assert allocation.mean_sparsity(levels) == pytest.approx(wanted, abs=0.02), name
        if score != "prefix":
            moved = allocation.levels_for(wanted, multiplier)
            assert allocation.mean_sparsity(moved, multiplier) == pytest.approx(wanted, abs=0.03), name


def test_a_dear_layer_is_skipped_less() -> None:
    layers = _layers("shadow", "threshold", 1)
    for name in ("sensitivity", "fisher"):
        levels = allocate(name, layers).levels_for(0.4)
        shares = [float(table.sparsity_at(level)) for table, level in zip(layers.tables, levels, strict=True)]
        assert shares[0] < shares[1], name


@given(st.integers(1, 64), st.floats(0, 1))
def test_a_level_of_topk_keeps_at_least_one_and_at_most_all(granules: int, level: float) -> None:
    k = AXES["topk"].threshold(level, granules)
    assert 1 <= k <= granules and k == round(k)
    assert abs(k - (1 - level) * granules) <= 1


def test_ties_of_topk_go_to_the_lowest_index() -> None:
    values = AXES["topk"].values(torch.tensor([[1.0, 3.0, 3.0, float("nan"), float("-inf")]]))
    assert values.tolist()[0][:4] == pytest.approx([0.2, 0.6, 0.4, 0.8])
    assert values[0, 4] == float("-inf")


# --- drift and plan ---


def simulated(ffns: tuple[EagerFFN, ...], plan: SparsityPlan) -> MethodSelectors:
    method = Method("plan", plan.score, plan.rule, plan.layers, plan.arrays)
    return Selectors(ffns, (method,)).layers[0]


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"wanda", "sparsegpt", "lory"}))
def test_masks_and_reference_modules_agree(policy: str) -> None:
    """What calibration simulates is what the op means, for every policy that masks (lory: test_lory)."""
    model = tiny_model("llama", 0)
    ffns = find_eager_ffns(model).found
    data = windows(1)
    result = calibrate(
        TorchDecoder(model), get_policy(policy, PolicySettings(granule=8, rows=200)),
        load_calibration_data(None, 256, context=CONTEXT), {"weights_digest": "0"},
        CalibrationOptions(sparsity=0.5, load_response=False),
    )  # fmt: skip
    plan = result.plan
    prompt = 8
    axis = AXES[plan.rule]
    # The level of a k is half a place below it: the op compares ranks, the axis shares.
    levels = np.array(
        [
            layer.threshold[0] if plan.rule != "topk" else 1 - (layer.threshold[0] + 0.5) / (layer.width // layer.granule)
            for layer in plan.layers
        ]
    )
    assert axis is not None
    drift = DriftMeter(TorchDecoder(model), data, prompt).measure(simulated(ffns, plan), levels)
    loads = np.zeros(CONTEXT, np.float32)
    loads[:prompt] = np.inf
    run = ReferenceModel(TorchDecoder(model), plan).run(data[0].tolist(), loads)
    log_p = torch.from_numpy(run.logits).log_softmax(-1)[prompt:-1]
    nll = -log_p.gather(1, data[0, prompt + 1 :, None]).flatten()
    np.testing.assert_allclose(drift.nll, nll, rtol=1e-4, atol=1e-4)
    widths = np.array([layer.width for layer in plan.layers])
    assert drift.sparsity == pytest.approx(1 - run.active[:, prompt:].sum() / widths.sum() / (CONTEXT - prompt), abs=1e-3)
    assert plan.expected_sparsity == pytest.approx(0.5, abs=0.1)
    assert SparsityPlan.from_dict(plan.to_dict()).to_dict()["layers"] == plan.to_dict()["layers"]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
def test_a_plan_by_budget_keeps_it(kind: str) -> None:
    model = tiny_model(kind, 0)
    data = load_calibration_data(None, 256, context=CONTEXT)
    seen: list[str] = []
    result = calibrate(
        TorchDecoder(model), get_policy("clada"), data, {"weights_digest": "0"}, CalibrationOptions(budget=Budget(kl=0.002)),
        lambda what, done, total: seen.append(what),
    )  # fmt: skip
    assert result.drift.kl_bound <= 0.002
    assert 0.0 < result.plan.expected_sparsity < 1.0
    assert set(seen) >= {"statistics", "sensitivity", "held-out windows"}
    assert 2 <= len(result.details["load_response"]) <= 4
    assert 0.0 < result.plan.calibration.to_dict()["relative_bytes"] < 1.2
    signal = result.plan.load
    better = [row for row in result.details["load_response"] if row["better"]]
    assert (signal.surprisal_weight != 0 or signal.entropy_weight != 0) == bool(better)


def test_scores_that_do_not_fit_are_refused() -> None:
    ffns = find_eager_ffns(tiny_model("llama", 0)).found
    with pytest.raises(UsageError, match="has no score 'prefix'"):
        get_policy("clada", PolicySettings(score="prefix")).check(ffns)
    with pytest.raises(UsageError, match="unknown policy 'magic'; known: "):
        get_policy("magic")


def test_a_policy_that_needs_a_gate_names_the_layer_without() -> None:
    ffns = find_eager_ffns(tiny_model("gpt2", 0)).found
    with pytest.raises(UsageError, match=r"'cats' reads the gate, and transformer\.h\.0\.mlp\.c_proj has none"):
        get_policy("cats").check(ffns)


def test_the_shadow_scorer_is_the_op(seed: int = 0) -> None:
    ffn = find_eager_ffns(tiny_model("llama", 0)).found[0]
    scorer = LayerScorer(ffn, "shadow")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
    tensors = layer_tensors(ffn, "shadow", torch.tensor([0.01]))
    result = sparse_ffn(x, torch.zeros(5), tensors, layer_attributes(ffn, "shadow", "threshold"))
    assert torch.equal(result.mask, ~(scorer(x, torch.zeros(5, 96)) < 0.01))


@pytest.mark.parametrize(("score", "bytes_a_weight"), [("shadow", 0.5 + 4 / 32), ("gate", 0.0), ("exact", 0.0)])
def test_scorers_hold_no_float32_copy_of_weights(score: str, bytes_a_weight: float) -> None:
    ffn = find_eager_ffns(tiny_model("llama", 0)).found[0]
    scorer = LayerScorer(ffn, score)
    x = torch.randn(3, ffn.hidden_size)
    scorer(x, torch.zeros(3, ffn.intermediate_size))
    held = [item for value in vars(scorer).values() for item in _tensors_in(value)]
    weights = 2 * ffn.intermediate_size * ffn.hidden_size
    assert sum(item.nbytes for item in held) <= weights * bytes_a_weight + 4 * ffn.intermediate_size


def _tensors_in(value: object) -> list[torch.Tensor]:
    if isinstance(value, list | tuple):
        return [item for part in value for item in _tensors_in(part)]
    return [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "phi3"])
@pytest.mark.parametrize("score", ["shadow", "gate", "exact"])
def test_a_scorer_scores_as_the_op(kind: str, score: str) -> None:
    ffn = find_eager_ffns(tiny_model(kind, 0)).found[0]
    tensors = layer_tensors(ffn, score, torch.zeros(1))
    attributes = layer_attributes(ffn, score, "threshold")
    x = torch.randn(5, ffn.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden, gate = neuron_outputs(x, tensors.w_in, tensors, attributes)
    wanted = neuron_scores(x, hidden, gate, tensors, attributes, None, None)
    torch.testing.assert_close(LayerScorer(ffn, score)(x, hidden), wanted, rtol=1e-5, atol=1e-7)
