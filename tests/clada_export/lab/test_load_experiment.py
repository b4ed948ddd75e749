"""The load experiment on tiny models: what each arm does, that sparsity is equal, and what is written down."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clada_export.calibration.allocation import Layers, allocate
from clada_export.calibration.axis import AXES
from clada_export.calibration.drift import DriftMeter
from clada_export.calibration.load_response import error_slopes
from clada_export.calibration.selector import Selectors
from clada_export.calibration.statistics import LayerTable, collect_statistics
from clada_export.cli import main
from clada_export.decoder.ffn import find_eager_ffns
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UsageError
from clada_export.lab.load_experiment import ExperimentOptions, run_experiment
from clada_export.lab.load_experiment.arms import ARMS, MIDDLE, Scene, by_document, drawn, response, shuffled, still
from clada_export.lab.load_experiment.balance import balanced_levels
from clada_export.lab.load_experiment.documents import Documents, cut, ending_tokens, from_file, generate
from clada_export.lab.load_experiment.intervals import paired_interval
from clada_export.lab.load_experiment.report import plot, save, tables, verdict
from clada_export.lab.load_experiment.simulate import Run, document_signals, simulate
from clada_export.load.signal import LoadSignal
from clada_export.load.tracker import loads_along
from clada_export.plan.method import Method, draft_layers
from clada_export.plan.plan import SparsityPlan
from clada_export.verify.eager import ReferenceModel
from tests.tiny_models import tiny_model

CONTEXT, PROMPT = 32, 8
BASE = LoadSignal(5.0, 1.5, 5.2, 0.4, 0.0, 0.0)
Folder = Callable[[str], Path]


def documents(count: int, context: int = CONTEXT, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 256, (count, context), generator=torch.Generator().manual_seed(seed))


def scene(count: int = 5, context: int = 40) -> Scene:
    rng = np.random.default_rng(0)
    surprisal, entropy = rng.gamma(3, 1.7, (count, context - 1)), rng.normal(5.2, 0.4, (count, context - 1))
    return Scene(surprisal, entropy, PROMPT, BASE, (5.0, 0.5))


# --- texts ---


def test_documents_of_a_text() -> None:
    found = cut("text", list(range(103)), 3, 10).tokens
    assert found.shape == (3, 10) and found[:, 0].tolist() == [0, 40, 90]
    with pytest.raises(UsageError, match="25 tokens are 2 documents of 10, and 3 are wanted"):
        cut("text", list(range(25)), 3, 10)
    with pytest.raises(UsageError, match="no tokenizer"):
        from_file(Path("text"), None, 2, 10)


def test_a_model_writes_on() -> None:
    model = tiny_model("llama")
    prompts = documents(3, PROMPT)
    greedy = generate(TorchDecoder(model), prompts, CONTEXT, temperature=0.0)
    wanted = model.generate(
        prompts, max_new_tokens=CONTEXT - PROMPT, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    assert torch.equal(greedy, wanted)
    sampled = [generate(TorchDecoder(model), prompts, CONTEXT, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])
    first = int(greedy[0, PROMPT])
    assert int(generate(TorchDecoder(model), prompts, CONTEXT, temperature=0.0, forbidden=[first])[0, PROMPT]) != first
    assert ending_tokens(TorchDecoder(model)) == {2}


# --- arms ---


def test_every_arm_gives_loads_that_only_look_back() -> None:
    whole = scene()
    assert len({(arm.method, arm.group, arm.name) for arm in ARMS}) == len(ARMS)
    for arm in ARMS:
        loads = arm.loads(whole, np.random.default_rng(0))
        assert loads.shape == (5, 40 - PROMPT)
        assert not np.isnan(loads).any() and not np.isneginf(loads).any()
        if "shuffled" in arm.name or "drawn" in arm.name:
            continue
        # What comes later does not change what was.
        for end in (PROMPT + 1, 25):
            short = replace(whole, surprisal=whole.surprisal[:, : end - 1], entropy=whole.entropy[:, : end - 1])
            np.testing.assert_array_equal(arm.loads(short, np.random.default_rng(0)), loads[:, : end - PROMPT])


def test_controls() -> None:
    place, rng = scene(), np.random.default_rng(0)
    real = response("surprisal", MIDDLE)(place, rng)
    z = (place.surprisal - 5.0) / 1.5
    # The first token after the prompt runs under its own surprisal, as in an engine.
    np.testing.assert_allclose(real, np.clip(0.4 * z[:, PROMPT - 1 :], -4, 4), rtol=1e-5)
    late = response("surprisal", MIDDLE, late=1)(place, rng)
    np.testing.assert_allclose(late, np.clip(0.4 * z[:, PROMPT - 2 : -1], -4, 4), rtol=1e-5)
    permuted = shuffled(response("surprisal", MIDDLE))(place, rng)
    assert not np.array_equal(permuted, real)
    np.testing.assert_array_equal(np.sort(permuted, axis=1), np.sort(real, axis=1))
    found = drawn(response("surprisal", MIDDLE))(place, rng)
    assert np.isin(found, real).all() and not np.array_equal(np.sort(found, axis=1), np.sort(real, axis=1))
    constant = by_document(0.1)(place, rng)
    np.testing.assert_allclose(constant[:, 0], 0.4 * (place.surprisal[:, : PROMPT - 1].mean(1) - 5.0) / 0.5)
    assert (constant == constant[:, :1]).all()
    assert (still(place, rng) == 0).all()


# --- simulation ---


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    model = tiny_model("llama")
    ffns = find_eager_ffns(model).found
    methods = (
        Method("plain", "exact", "threshold", draft_layers(ffns)),
        Method("prior", "exact", "threshold", draft_layers(ffns, prior_gamma=0.5)),
        Method("topk", "exact", "topk", draft_layers(ffns)),
    )
    selectors = Selectors(ffns, methods)
    statistics = collect_statistics(TorchDecoder(model), selectors, documents(4, seed=9), PROMPT)
    allocations = [
        allocate("sparsity", Layers(AXES[method.rule], table, (96, 96), (1.0, 1.0)))
        for method, table in zip(methods, statistics.tables, strict=True)
    ]
    return {"model": model, "ffns": ffns, "methods": methods, "selectors": selectors, "allocations": allocations}


def test_without_a_response_it_is_what_calibration_measures(tiny: dict[str, Any]) -> None:
    data = documents(3)
    for index in range(3):
        layers, allocation = tiny["selectors"].layers[index], tiny["allocations"][index]
        levels = allocation.levels_for(0.5)
        multiplier = torch.rand(3, CONTEXT, generator=torch.Generator().manual_seed(1)) + 0.5
        drift = DriftMeter(TorchDecoder(tiny["model"]), data, PROMPT).measure(layers, levels, multiplier)
        run = Run(layers, levels, multiplier[:, PROMPT:])
        (outcome,) = simulate(TorchDecoder(tiny["model"]), data, PROMPT, [run])
        np.testing.assert_allclose(outcome.kl, drift.window_kl(), rtol=1e-4, atol=1e-6)
        assert outcome.sparsity.mean() == pytest.approx(drift.sparsity, abs=1e-6)
        assert np.expm1(outcome.nll_increase.mean()) == pytest.approx(drift.ppl_increase, rel=1e-3)
        assert outcome.top1.mean() == pytest.approx(drift.top1.mean())


@pytest.mark.parametrize("method", [0, 1])
def test_dense_steps_and_refreshes_are_those_of_the_op(tiny: dict[str, Any], method: int) -> None:
    """Against the op's reference, which takes loads: +inf is dense, and its row enters the statistic."""
    layers, allocation = tiny["selectors"].layers[method], tiny["allocations"][method]
    levels = allocation.levels_for(0.5)
    data = documents(2)
    loads = np.random.default_rng(3).uniform(-2, 2, (2, CONTEXT - PROMPT)).astype(np.float32)
    loads[:, [3, 4, 11]] = np.inf
    multiplier = torch.from_numpy(np.where(np.isinf(loads), 0, np.exp(-0.25 * loads)))
    runs = [Run(layers, levels, multiplier, refresh=refresh) for refresh in (True, False)]
    outcome, without = simulate(TorchDecoder(tiny["model"]), data, PROMPT, runs)
    planned = tuple(
        replace(layer, threshold=(float(np.float32(level)),), load_slope=0.25)
        for layer, level in zip(tiny["methods"][method].layers, levels, strict=True)
    )
    plan = SparsityPlan("clada", "exact", "threshold", planned, BASE, {"weights_digest": "0"})
    reference = ReferenceModel(TorchDecoder(tiny["model"]), plan)
    for place, row in enumerate(data.tolist()):
        found = reference.run(row, np.concatenate([np.full(PROMPT, np.inf, np.float32), loads[place]]))
        sparsity = 1 - found.active[:, PROMPT:].sum() / (2 * 96 * (CONTEXT - PROMPT))
        assert outcome.sparsity[place] == pytest.approx(sparsity, abs=2e-3)
        dense = torch.from_numpy(TorchDecoder(tiny["model"]).dense_logits(row))[PROMPT:-1].log_softmax(-1)
        sparse = torch.from_numpy(found.logits)[PROMPT:-1].log_softmax(-1)
        assert outcome.kl[place] == pytest.approx(float((dense.exp() * (dense - sparse)).sum(-1).mean()), rel=0.02)
    same = np.allclose(outcome.kl, without.kl, rtol=1e-6)
    assert same == (method == 0)


def test_exponents_move_layers_apart(tiny: dict[str, Any]) -> None:
    layers, allocation = tiny["selectors"].layers[0], tiny["allocations"][0]
    levels, data = allocation.levels_for(0.5), documents(2)
    half = torch.full((2, CONTEXT - PROMPT), 0.5)
    ones = torch.ones(2, CONTEXT - PROMPT)
    powered, scaled = simulate(
        TorchDecoder(tiny["model"]),
        data,
        PROMPT,
        [
            Run(layers, levels, half, exponents=np.array([2.0, 0.0])),
            Run(layers, levels * np.array([0.25, 1.0]), ones),
        ],
    )
    np.testing.assert_allclose(powered.kl, scaled.kl, rtol=1e-5)


def test_balanced_levels_keep_the_mean(tiny: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    multiplier = np.exp(rng.normal(0, 0.3, (5, 40)))
    multiplier[:, :4] = 0.0
    for index, allocation in enumerate(tiny["allocations"]):
        for exponents in (None, np.array([0.5, 2.0])):
            levels = balanced_levels(allocation, 0.4, multiplier, exponents)
            shares = []
            for place, table in enumerate(allocation.layers.tables):
                factors = torch.from_numpy(multiplier[:, 4:].reshape(-1) ** (1 if exponents is None else exponents[place]))
                moved = allocation.layers.axis.moved(torch.tensor(levels[place]), factors)
                shares.append(table.sparsity_at(moved.numpy()).mean())
            # A tenth of all steps is dense.
            assert 0.9 * np.mean(shares) == pytest.approx(0.4, abs=0.005 if index < 2 else 0.01)
    assert np.isfinite(balanced_levels(tiny["allocations"][0], 0.5, np.zeros((2, 3)))).all()


def test_slopes_of_the_error_table() -> None:
    level = np.linspace(0.0, 4.0, 65)
    table = LayerTable(level, np.linspace(0, 0.97, 65), level[::4], 0.1 * level[::4] ** 2, level[::4])
    # cett = 0.1 level^2: the level goes with the root of the target.
    assert error_slopes([table, table], np.array([1.0, 2.0])) == pytest.approx([0.5, 0.5], abs=0.03)


# --- numbers ---


def test_intervals_cover_the_mean() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = paired_interval(rng.normal(1.0, 2.0, 30), trial)
        assert interval.low < interval.mean < interval.high
        covered += interval.low < 1.0 < interval.high
    assert 0.88 < covered / 200 < 0.99
    assert paired_interval(np.array([2.0])).low == -np.inf
    assert paired_interval(np.full(5, 0.25)).high == 0.25


# --- the whole ---


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return run_experiment(folder, ExperimentOptions(documents=2, context=32, score="gate"))


def test_every_arm_on_every_text_at_equal_sparsity(result: dict[str, Any]) -> None:
    assert [text["name"] for text in result["texts"]] == [
        "random tokens, held out",
        "written greedily",
        "sampled at T = 1",
        "all texts",
    ]
    for text in result["texts"]:
        assert len(text["arms"]) == 3 + len(ARMS)
        for arm in text["arms"]:
            assert len(arm["document_kl"]) == text["documents"]
            assert arm["kl"] == pytest.approx(np.mean(arm["document_kl"]))
            assert arm["low"] <= arm["difference"] + 1e-12 and arm["difference"] <= arm["high"] + 1e-12
            assert arm["difference"] == pytest.approx(arm["kl"] - arm["baseline_kl"], abs=1e-9)
            if arm["group"] == "baseline":
                assert arm["difference"] == arm["dense_steps"] == 0 and 0.3 < arm["sparsity"] < 0.7
        equal = [arm["equal_sparsity"] for arm in text["arms"]]
        assert np.mean(equal) > 0.8
    json.dumps(result, allow_nan=False)


def test_what_is_written(result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(result, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"load-experiment.{kind}" for kind in ("json", "md", "png")
    ]
    assert json.loads((tmp_path / "out" / "load-experiment.json").read_text()) == result
    page = (tmp_path / "out" / "load-experiment.md").read_text()
    assert verdict(result) in page
    for arm in ARMS:
        assert f"| {arm.name} |" in page
    widths = {line.count("|") for line in tables(result).split("\n\n")[1].splitlines()}
    assert widths == {7}
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot(result, tmp_path / "no.png", said.append)
    assert "clada-export[eval]" in said[0] and not (tmp_path / "no.png").exists()
    with pytest.raises(UsageError, match="can't be written"):
        save(result, tmp_path / "out" / "load-experiment.md" / "x")


def test_the_verdict_names_what_the_intervals_say(result: dict[str, Any]) -> None:
    text = result["texts"][-1]

    def changed(low: float, high: float, equal: bool = True) -> dict[str, Any]:
        arms = [{**arm, "low": -1.0, "high": 1.0} for arm in text["arms"]]
        arms[5] = {**arms[5], "low": low, "high": high, "equal_sparsity": equal}
        return {**result, "texts": [{**text, "arms": arms}]}

    name = text["arms"][5]["name"]
    assert f"lower than without a response, by an interval without 0, with: {name}" in verdict(changed(-0.2, -0.1))
    assert f"higher than without a response, by an interval without 0, with: {name}" in verdict(changed(0.1, 0.2))
    assert name not in verdict(changed(-0.2, -0.1, equal=False)) and name not in verdict(changed(-0.1, 0.1))


def test_the_command(model_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["load-experiment", str(model_folder("llama")), "-o", str(out), "--documents", "2", "--context", "24"]
    arguments += ["--score", "gate", "--no-generated", "--group", "per document"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert "3 arms on 2 documents" in captured.err
    found = json.loads((out / "load-experiment.json").read_text())
    assert [text["name"] for text in found["texts"]] == ["random tokens, held out"]
    assert main([*arguments, "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    repeated = json.loads(captured.out)
    assert {**repeated, "seconds": 0} == {**found, "seconds": 0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"documents": 1}, "at least 2"),
        ({"context": 8}, "at least 16 tokens"),
        ({"groups": ("magic",)}, "unknown; known: M2 exp"),
        ({"score": "magic"}, "--score 'magic'"),
        ({"sparsity": 1.5}, "1.5"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run_experiment("nowhere", ExperimentOptions(**options))


def test_a_scene_follows_the_rule_from_the_last_prompt_token_on() -> None:
    place = scene()
    signal = replace(BASE, surprisal_weight=1.0, momentum=0.3)
    wanted = loads_along(signal, place.surprisal[:, PROMPT - 1 :], place.entropy[:, PROMPT - 1 :])
    np.testing.assert_array_equal(place.follow(signal), wanted)


def test_signals_are_those_of_the_dense_model() -> None:
    model = tiny_model("llama")
    data = documents(2)
    surprisal, entropy = document_signals(TorchDecoder(model), data)
    logits = TorchDecoder(model).dense_logits(data[1].tolist()).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(surprisal[1], -log_p[np.arange(CONTEXT - 1), data[1, 1:]], rtol=1e-4)
    np.testing.assert_allclose(entropy[1], -(np.exp(log_p) * log_p).sum(-1)[:-1], rtol=1e-4)
    assert Documents("x", data).tokens is data
