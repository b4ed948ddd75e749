"""The benchmark of all policies: its arithmetic, and a small run from end to end."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import policies, policy_page
from benchmarks.policy_bytes import (
    ABOVE,
    BELOW,
    EXACT,
    Needed,
    measured_bytes,
    needed_bytes,
    next_extra,
    packed_bytes,
    reads_less,
    summarise,
)
from benchmarks.policy_engine import common_prefix
from benchmarks.policy_quality import HeldOut, PlanDecoder, level_of
from benchmarks.policy_results import Contender, Results, contenders, grid
from benchmarks.teal import Teal, line_chance, lines_skipped
from clada_export.calibration.axis import AXES
from clada_export.calibration.calibrate import Calibrator
from clada_export.calibration.cost import relative_bytes
from clada_export.calibration.drift import DriftMeter
from clada_export.calibration.selector import Selectors
from clada_export.calibration.text import default_text
from clada_export.decoder.ffn import find_eager_ffns
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UsageError
from clada_export.load.signal import LoadSignal
from clada_export.methods import POLICIES
from clada_export.plan.method import Method, draft_layers
from clada_export.plan.plan import SparsityPlan
from tests.benchmarks.tiny import write_tiny_llama
from tests.tiny_models import tiny_model

WINDOWS = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(1))
PROMPT = 10


# --- bytes ---


def test_needed_bytes_lie_between_points_by_the_logarithm() -> None:
    points = [(0.8, 0.01), (0.4, 0.16), (0.6, 0.04)]
    middle = needed_bytes(points, 0.02)
    assert middle is not None
    assert middle == Needed(pytest.approx(0.7), EXACT)
    assert needed_bytes(points, 0.16) == Needed(0.4, BELOW)
    assert needed_bytes(points, 0.001) == Needed(0.8, ABOVE)
    assert needed_bytes([], 0.1) is None
    assert needed_bytes([(1.0, 0.001), (1.0, 0.4)], 0.1) == Needed(1.0, EXACT) == needed_bytes([(1.0, 0.4)], 0.1)


@given(
    st.lists(st.tuples(st.floats(0.05, 0.99), st.floats(1e-6, 5.0)), min_size=1, max_size=8, unique_by=lambda point: point[0]),
    st.floats(1e-5, 3.0),
)
def test_needed_bytes_are_within_the_points(points: list[tuple[float, float]], target: float) -> None:
    found = needed_bytes(points, target)
    assert found is not None
    sizes = [size for size, _ in points]
    assert min(sizes) - 1e-12 <= found.bytes <= max(sizes) + 1e-12
    good = [size for size, kl in points if kl <= target]
    assert (found.bound == ABOVE) == (not good)
    if good:
        assert found.bytes <= min(good) + 1e-12


def test_bounds_decide_only_what_they_can() -> None:
    assert reads_less(Needed(0.5), Needed(0.6)) is True
    assert reads_less(Needed(0.6), Needed(0.6)) is False
    assert reads_less(Needed(0.6), Needed(0.6, ABOVE)) is True
    assert reads_less(Needed(0.5), Needed(0.4, ABOVE)) is None
    assert reads_less(Needed(0.5), Needed(0.4, BELOW)) is False
    assert reads_less(Needed(0.5), Needed(0.6, BELOW)) is None
    assert reads_less(Needed(0.5, BELOW), Needed(0.6)) is True
    assert reads_less(Needed(0.5, ABOVE), Needed(0.6)) is None
    assert reads_less(Needed(0.7, ABOVE), Needed(0.6)) is False


def _cell(name: str, size: float, kl: float, **more: Any) -> dict[str, Any]:
    return {"contender": name, "sparsity": 1 - size, "bytes": size, "quality": {"kl": kl}, **more}


def test_the_summary_compares_with_what_trains_nothing() -> None:
    cells = [
        *(_cell("clada", 0.7, 0.01), _cell("clada", 0.5, 0.1)),
        *(_cell("cats", 0.8, 0.01), _cell("cats", 0.7, 0.1)),
        *(_cell("dejavu", 0.4, 0.001, trained=True), _cell("dejavu", 0.2, 0.1, trained=True)),
        {"contender": "lte", "sparsity": 0.5, "error": "no"},
    ]
    (found,) = summarise(cells, [0.03])
    assert found["clada_reads_less"] == {"cats": True} and found["holds"] is True
    assert set(found["needed"]) == {"clada", "cats", "dejavu"}
    (found,) = summarise([*cells, _cell("tt", 0.1, 0.02)], [0.03])
    assert found["clada_reads_less"]["tt"] is False and found["holds"] is False
    (found,) = summarise([*cells, _cell("tt", 0.1, 0.4)], [0.03])
    assert found["holds"] is None


def test_further_sparsities_bracket_the_targets() -> None:
    points = [(0.3, 0.8, 0.05), (0.7, 0.4, 0.07)]
    assert next_extra(points, (0.03, 0.08), [0.1, 0.2, 0.8, 0.9]) == 0.2
    assert next_extra([*points, (0.2, 0.9, 0.02)], (0.03, 0.08), [0.1, 0.8, 0.9]) == 0.8
    assert next_extra([(0.3, 0.8, 0.01), (0.7, 0.4, 0.3)], (0.03, 0.08), [0.1, 0.9]) is None
    assert next_extra([(0.3, 0.8, 0.5)], (0.03, 0.08), [0.8]) is None
    assert next_extra([], (0.03,), [0.1]) is None


def test_packed_weights_pay_for_their_mask() -> None:
    assert packed_bytes(0.5) == 0.53125


# --- quality ---


def _plan(rule: str, threshold: float, score: str = "gate", **settings: Any) -> tuple[Any, list[Any], SparsityPlan]:
    model = tiny_model("llama")
    ffns = list(find_eager_ffns(model).found)
    layers = tuple(replace(layer, threshold=(threshold,)) for layer in draft_layers(ffns, **settings))
    return model, ffns, SparsityPlan("test", score, rule, layers, LoadSignal(surprisal_weight=0.0), {"weights_digest": ""})


@pytest.mark.parametrize(
    ("score", "rule", "threshold"), [("gate", "threshold", 0.1), ("exact", "relative", 0.2), ("prefix", "topk", 37.0)]
)
def test_a_plan_drifts_as_calibration_measures_it(
    score: str, rule: str, threshold: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several chunks a window.
    monkeypatch.setattr("benchmarks.policy_quality.CHUNK", 7)
    model, ffns, plan = _plan(rule, threshold, score)
    heldout = HeldOut(TorchDecoder(model), WINDOWS, PROMPT, tmp_path)
    found = heldout.measure(PlanDecoder(ffns, plan, heldout.signals, PROMPT))
    meter = DriftMeter(TorchDecoder(model), WINDOWS, PROMPT)
    torch.testing.assert_close(heldout.signals, meter.signals)
    method = Method("test", score, rule, plan.layers)
    levels = np.array([float(level_of(AXES[rule], rule, layer)) for layer in plan.layers])
    wanted = meter.measure(Selectors(ffns, [method]).layers[0], levels)
    # KL is the rest of three terms of some nats each (`clada_export.calibration.teacher`).
    np.testing.assert_allclose(found.drift.kl, wanted.kl, rtol=1e-4, atol=4e-6)
    np.testing.assert_array_equal(found.drift.window, wanted.window)
    assert found.drift.sparsity == pytest.approx(wanted.sparsity, abs=1e-6)
    assert 0.05 < found.drift.sparsity < 0.95 and found.drift.mean_kl > 1e-5
    assert list(tmp_path.iterdir()) == []


def test_pruned_weights_are_measured_against_the_dense_model(tmp_path: Path) -> None:
    model, ffns, _ = _plan("threshold", 0.0)
    heldout = HeldOut(TorchDecoder(model), WINDOWS, PROMPT, tmp_path)
    assert heldout.measure(None).drift.mean_kl < 1e-6
    with torch.no_grad():
        ffns[0].down.weight.mul_(0.5)
    assert heldout.measure(None).drift.mean_kl > 1e-4


@pytest.mark.parametrize("k", [1, 37, 96])
def test_the_level_of_a_count_keeps_so_many(k: int) -> None:
    _, _, plan = _plan("topk", float(k), "prefix")
    scores = torch.rand(5, 96, generator=torch.Generator().manual_seed(k))
    values = AXES["topk"].values(scores)
    assert (~(values < level_of(AXES["topk"], "topk", plan.layers[0]))).sum(-1).tolist() == [k] * 5


def test_bytes_follow_the_measured_sparsity() -> None:
    _, _, plan = _plan("threshold", 0.0)
    assert measured_bytes(plan, [0.0, 0.0]) == 1.0 == relative_bytes(plan)
    # The gate is read for every neuron, the other two rows for those that run.
    assert measured_bytes(plan, [0.25, 0.75]) == pytest.approx((1 + 2 * 0.5) / 3)


# --- TEAL ---


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_teal_without_sparsity_is_the_dense_model(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    teal = Teal(TorchDecoder(model), WINDOWS, PROMPT)
    heldout = HeldOut(TorchDecoder(model), WINDOWS, PROMPT, tmp_path)
    found = heldout.measure(teal.decoder(teal.uniform(0.0), PROMPT))
    assert found.drift.mean_kl < 1e-6 and found.drift.sparsity == 0.0


def test_teal_skips_the_share_that_is_asked_for(tmp_path: Path) -> None:
    model = tiny_model("llama")
    teal = Teal(TorchDecoder(model), WINDOWS, PROMPT)
    heldout = HeldOut(TorchDecoder(model), WINDOWS, PROMPT, tmp_path)
    half = heldout.measure(teal.decoder(teal.uniform(0.5), PROMPT))
    most = heldout.measure(teal.decoder(teal.uniform(0.8), PROMPT))
    assert half.drift.sparsity == pytest.approx(0.5, abs=0.03)
    assert most.drift.mean_kl > half.drift.mean_kl > 1e-4
    greedy = np.array(teal.greedy(0.5))
    assert greedy.shape == (2, 3)
    np.testing.assert_allclose(greedy.mean(axis=1), 0.5, atol=1e-6)
    for layer, shares in zip(teal.layers, greedy, strict=True):
        w_out = layer.ffn.w_out()
        errors = [
            float(((layer.run(layer.sample_x, one)[0] - layer.sample_h) @ w_out).norm()) for one in (shares.tolist(), [0.5] * 3)
        ]
        assert errors[0] <= errors[1]


def test_a_line_is_skipped_only_as_a_whole() -> None:
    kept = torch.zeros(2, 40, dtype=torch.bool)
    kept[0, 3] = True
    assert lines_skipped(kept) == 0.75
    assert line_chance(0.5) == 2**-16


# --- the command ---


def test_rows_of_the_table() -> None:
    found = {one.name: one for one in contenders()}
    assert (
        set(POLICIES) <= set(found)
        and found["lory"].only == 0.5
        and {"lte-finetuned", "wanda-neurons", "sparsegpt-2:4", "teal"} <= set(found)
    )
    assert [one.name for one in contenders(["wanda", "teal"])] == ["wanda", "wanda-neurons", "wanda-2:4", "teal", "teal-greedy"]
    assert [one.name for one in contenders(["wanda-neurons"])] == ["wanda-neurons"]
    with pytest.raises(UsageError, match=r"'nothing'; known: .*clada"):
        contenders(["nothing"])
    cells = grid(contenders(["wanda"]), [0.3, 0.5])
    assert [(one.name, sparsity) for one, sparsity in cells] == [
        *(("wanda", 0.3), ("wanda", 0.5), ("wanda-neurons", 0.3), ("wanda-neurons", 0.5), ("wanda-2:4", 0.5)),
    ]


def test_a_finished_cell_is_kept_and_a_failed_one_is_not(tmp_path: Path) -> None:
    path, clada = tmp_path / "out.json", Contender("clada", "clada", "dynamic", False)
    results = Results(path, {"windows": 2})
    results.put(_cell("tt", 0.5, 0.1) | {"sparsity": 0.5})
    results.put({"contender": "clada", "sparsity": 0.5, "error": "no"})
    again = Results(path, {"windows": 2})
    assert [cell["contender"] for cell in again.cells] == ["clada", "tt"]
    assert not again.has(clada, 0.5, speed=False)
    again.put(_cell("clada", 0.5, 0.1))
    assert again.has(clada, 0.5, speed=False) and not again.has(clada, 0.5, speed=True)
    assert len(again.cells) == 2
    with pytest.raises(UsageError, match="other windows"):
        Results(path, {"windows": 3})
    again.describe(model={"weights_digest": "a" * 64})
    with pytest.raises(UsageError, match="another model"):
        again.describe(model={"weights_digest": "b" * 64})


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2]) == 2
    assert common_prefix([5], [1]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, Any]]:
    """The work folder, the arguments, and the result of a small benchmark."""
    work = tmp_path_factory.mktemp("policies")
    write_tiny_llama(work / "tiny")
    (work / "text.txt").write_text(default_text()[:20000])
    arguments = [
        *(str(work / "tiny"), "--out", str(work / "out.json"), "--text", str(work / "text.txt"), "--work", str(work)),
        *("--windows", "2", "--window-tokens", "64", "--context", "64", "--new-tokens", "6", "--prompts", "2"),
        *("--threads", "1", "--sparsities", "0.5", "--extra", "0.8", "--policies", "clada,wanda-neurons,teal"),
    ]
    assert policies.main(arguments) == 0
    return work, arguments, json.loads((work / "out.json").read_text())


def test_a_run_from_end_to_end(run: tuple[Path, list[str], dict[str, Any]]) -> None:
    work, _, result = run
    cells = {(cell["contender"], cell["sparsity"]): cell for cell in result["cells"]}
    clada, pruned, teal = (cells[name, 0.5] for name in ("clada", "wanda-neurons", "teal"))
    assert ("clada", 0.8) in cells and "speed" not in cells["clada", 0.8]
    for cell in (clada, teal):
        assert cell["measured_sparsity"] == pytest.approx(0.5, abs=0.1)
        assert len(cell["layer_sparsity"]) == 2 and cell["quality"]["tokens"] == 2 * (64 - 16 - 1)
    # The engine skips what eager PyTorch says, on other text; and its dense side is the dense model.
    assert clada["speed"]["sparse"]["sparsity"] == pytest.approx(clada["measured_sparsity"], abs=0.1)
    assert clada["greedy"]["prefix_of_dense_side"] == [6, 6]
    assert clada["speed"]["speedup"]["low"] <= clada["speed"]["speedup"]["median"] <= clada["speed"]["speedup"]["high"]
    # Removed neurons are not in the engine: all of those that it has run, and the text is not the dense model's.
    assert pruned["bytes"] == 0.5 and pruned["speed"]["sparse"]["sparsity"] == 0.0
    assert pruned["greedy"]["prefix"] == pruned["greedy"]["prefix_of_dense_side"]
    assert pruned["quality"]["kl"] > 1e-3
    assert teal["bytes"] == pytest.approx(1 - teal["measured_sparsity"]) and "speed" not in teal
    assert str(work) not in json.dumps(result)
    assert not list(work.glob("policies-*"))


@pytest.mark.long
def test_speed_is_added_to_a_kept_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_llama(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(default_text()[:20000])
    arguments = [
        *(str(tmp_path / "tiny"), "--out", str(tmp_path / "out.json"), "--text", str(tmp_path / "text.txt")),
        *("--work", str(tmp_path), "--windows", "2", "--window-tokens", "64", "--context", "64", "--new-tokens", "6"),
        *("--prompts", "2", "--threads", "1", "--sparsities", "0.5", "--extra", "", "--policies"),
        "moefication,lte-finetuned,lory,wanda-neurons",
    ]
    assert policies.main([*arguments, "--no-speed"]) == 0
    before = json.loads((tmp_path / "out.json").read_text())["cells"]

    def calibrate(*_: Any) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(Calibrator, "calibrate", calibrate)
    assert policies.main(arguments) == 0
    after = json.loads((tmp_path / "out.json").read_text())["cells"]
    for old, new in zip(before, after, strict=True):
        assert "speed" not in old and {**new, "seconds": None} == {**new, **old, "seconds": None}
        assert set(new["seconds"]) == {"calibration", "quality", "build", "speed"}
    # The routers came along with the plan, and the pruned weights are pruned again.
    cells = {cell["contender"]: cell for cell in after}
    assert after[0]["speed"]["sparse"]["sparsity"] == pytest.approx(after[0]["measured_sparsity"], abs=0.05)
    pruned = cells["wanda-neurons"]["greedy"]
    assert pruned["prefix"] == pruned["prefix_of_dense_side"]
    # Two experts merged into one: no mask, half of the weights, and the dense side is the model.
    assert cells["lory"]["measured_sparsity"] == 0.5 == cells["lory"]["bytes"] and cells["lory"]["quality"]["kl"] > 1e-3
    assert cells["lory"]["speed"]["sparse"]["sparsity"] == pytest.approx(0.5)
    assert cells["lory"]["greedy"]["prefix_of_dense_side"] == [6, 6]
    assert cells["lte-finetuned"]["quality"]["kl"] > 1e-6


def test_a_second_run_measures_nothing(
    run: tuple[Path, list[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, arguments, result = run

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("benchmarks.policy_bench.Bench.__init__", fail)
    assert policies.main(arguments) == 0
    assert json.loads(Path(arguments[2]).read_text()) == result
    assert "kept from before" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="was loaded"):
        policies.main([*arguments, "--again"])


def test_the_page_has_a_row_for_every_cell(run: tuple[Path, list[str], dict[str, Any]]) -> None:
    result = copy.deepcopy(run[2])
    section = policy_page.section("tiny", result, set())
    for name in ("clada", "wanda-neurons", "teal (simulated, not exported)"):
        assert f"| {name} | 50% |" in section
    assert "| clada | 80% |" in section
    result["cells"].append({"contender": "lte", "sparsity": 0.5, "error": "no | such"})
    assert "lte at 50%: no | such" in policy_page.section("tiny", result, set())


def test_pictures_of_a_result(run: tuple[Path, list[str], dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'clada-export[eval]'")
    policy_page.draw("tiny", run[2], tmp_path / "tiny.png")
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_the_recorded_pages_are_what_the_recorded_results_give() -> None:
    for path, text in policy_page.current().items():
        assert path.read_text(encoding="utf-8") == text
