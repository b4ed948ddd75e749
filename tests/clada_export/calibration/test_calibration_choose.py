"""`--policy auto`: which policy is taken and why, what is said when none can be, and the clock beside the cost model."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clada_export import export
from clada_export.artifact.report import write_report
from clada_export.calibration import Budget, CalibrationOptions, load_calibration_data
from clada_export.calibration.calibrate import Calibrator, OutdoneError
from clada_export.calibration.choose import choose, plan_clock
from clada_export.calibration.clock import read_clock
from clada_export.calibration.heldout import HeldOut
from clada_export.calibration.selector import MethodSelectors, Selectors
from clada_export.cli import main_export
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import BackendError, UsageError
from clada_export.export_options import ExportOptions
from clada_export.methods import POLICIES, PolicySettings, all_policies, get_policy
from clada_export.plan.method import Method
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.reads import dense_bytes, read_bytes
from clada_export.verify.eager import ReferenceModel
from tests.tiny_models import tiny_model

# The package's attribute of this name is the function.
stage = importlib.import_module("clada_export.calibration.calibrate")
SOURCE = {"weights_digest": "0"}
TRAINING_FREE = {name: POLICIES[name] for name in ("clada", "griffin", "tt", "cats")}
LOOSE = CalibrationOptions(budget=Budget(kl=0.01), load_response=False)


def calibrator(kind: str = "llama", context: int = 32, **overrides: Any) -> Calibrator:
    model = tiny_model(kind, 0, **overrides)
    return Calibrator(TorchDecoder(model), load_calibration_data(None, 256, context=context))


def rows_of(auto: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["policy"]: row for row in auto["candidates"]}


def test_the_fewest_bytes_within_the_budget_are_taken() -> None:
    shared = calibrator()
    result = choose(shared, SOURCE, LOOSE, policies=TRAINING_FREE)
    auto = result.plan.calibration.to_dict()["auto"]
    rows = rows_of(auto)
    alone = {name: shared.calibrate(policy, SOURCE, LOOSE) for name, policy in TRAINING_FREE.items()}
    for name, found in alone.items():
        if rows[name]["relative_bytes"] is None:
            # Outdone: not measured further than to where it would read as many bytes as the best so far.
            assert rows[name]["cost"] is None or rows[name]["cost"] > 1
            continue
        assert rows[name]["relative_bytes"] == found.plan.calibration.to_dict()["relative_bytes"], name
        assert rows[name]["kl"] == found.drift.mean_kl
        assert rows[name]["cost"] <= 1.0
    cheapest = min(alone, key=lambda name: alone[name].plan.calibration.to_dict()["relative_bytes"])
    assert result.plan.policy == auto["chosen"] == cheapest
    assert result.plan.layers == alone[cheapest].plan.layers
    assert rows[cheapest]["chosen"] and sum(row["chosen"] for row in rows.values()) == 1
    assert all(row["why"].startswith("reads x") for name, row in rows.items() if name != cheapest)
    assert result.details["auto"] == auto and auto["text"].startswith(f"{cheapest} of 4 policies for kl=0.01: x0.")
    json.dumps(result.plan.to_dict(), allow_nan=False)


def test_a_sparsity_takes_the_lowest_divergence_and_says_so() -> None:
    result = choose(calibrator(), SOURCE, replace(LOOSE, sparsity=0.5), policies=TRAINING_FREE)
    auto = result.plan.calibration.to_dict()["auto"]
    rows = rows_of(auto)
    fewer = [name for name, row in rows.items() if row["relative_bytes"] < 1]
    assert auto["chosen"] == min(fewer, key=lambda name: rows[name]["kl"])
    assert "lowest measured KL" in auto["rule"] and "no price" in auto["rule"]
    assert all(row["cost"] is None for row in rows.values())


@pytest.mark.parametrize("budget", [Budget(cett=0.2), Budget(ppl=0.05, kl=0.02)])
def test_other_budgets(budget: Budget) -> None:
    policies = {name: POLICIES[name] for name in ("tt", "cats")}
    result = choose(calibrator(), SOURCE, replace(LOOSE, budget=budget), policies=policies)
    assert all(row["cost"] <= 1.0001 for row in result.plan.calibration.to_dict()["auto"]["candidates"])


def test_what_an_architecture_cannot_carry_is_skipped_with_the_reason() -> None:
    result = choose(calibrator("gpt2"), SOURCE, LOOSE, policies=TRAINING_FREE)
    rows = rows_of(result.plan.calibration.to_dict()["auto"])
    assert rows["cats"]["why"].startswith("skipped: policy 'cats' reads the gate")
    assert rows["cats"]["relative_bytes"] is None and not rows["cats"]["chosen"]


def test_policies_that_train_take_part_only_when_asked() -> None:
    trained = next(name for name, policy in POLICIES.items() if policy.trained)
    found = all_policies(PolicySettings(rows=100, granule=8))
    policies = {name: found[name] for name in ("griffin", trained)}
    shared = calibrator()
    without = rows_of(choose(shared, SOURCE, LOOSE, policies=policies).plan.calibration.to_dict()["auto"])
    assert without[trained]["why"] == "skipped: it trains routers; --train lets it take part"
    with_it = rows_of(choose(shared, SOURCE, LOOSE, policies=policies, train=True).plan.calibration.to_dict()["auto"])
    assert not with_it[trained]["why"].startswith("skipped")


def test_pruned_zeros_are_still_read() -> None:
    policies = {name: POLICIES[name] for name in ("griffin", "wanda")}
    shared = calibrator()
    before = shared.decoder.ffns[0].w_out().clone()
    rows = rows_of(choose(shared, SOURCE, LOOSE, policies=policies).plan.calibration.to_dict()["auto"])
    assert "zeros are stored like other weights" in rows["wanda"]["why"]
    assert bool((shared.decoder.ffns[0].w_out() == before).all())


def test_the_weights_are_left_as_the_chosen_plan_says() -> None:
    shared = calibrator()
    before = shared.decoder.ffns[0].w_out().clone()
    options, found = replace(LOOSE, sparsity=0.3), all_policies(PolicySettings(pattern="neurons"))
    one = choose(shared, SOURCE, options, policies={"wanda": found["wanda"]})
    assert one.plan.prune is not None and bool((shared.decoder.ffns[0].w_out() != before).any())
    both = choose(shared, SOURCE, options, policies={"clada": found["clada"], "wanda": found["wanda"]})
    changed = bool((shared.decoder.ffns[0].w_out() != before).any())
    assert changed == (both.plan.prune is not None)


def test_a_budget_that_none_keeps_names_the_nearest() -> None:
    options = replace(LOOSE, budget=Budget(kl=1e-9))
    with pytest.raises(UsageError) as caught:
        choose(calibrator(), SOURCE, options, policies=TRAINING_FREE)
    text = str(caught.value)
    assert "no policy keeps the budget kl=1e-09" in text and "at 2% of sparsity" in text
    shared, costs = calibrator(), {}
    for name, policy in TRAINING_FREE.items():
        with pytest.raises(UsageError) as one:
            shared.calibrate(policy, SOURCE, options)
        costs[name] = one.value.cost  # type: ignore[attr-defined]
    nearest = min(costs, key=lambda name: costs[name])
    assert f"The nearest is {nearest}, which costs {costs[nearest]:.3g} times what it allows" in text


def test_no_policy_at_all() -> None:
    with pytest.raises(UsageError, match=r"no policy can be used here \(cats: policy 'cats' reads the gate"):
        choose(calibrator("opt"), SOURCE, LOOSE, policies={"cats": POLICIES["cats"]})


# --- the clock ---


def test_the_clock_counts_the_neurons_that_the_op_runs() -> None:
    shared = calibrator(context=48)
    result = shared.calibrate(POLICIES["clada"], SOURCE, replace(LOOSE, sparsity=0.5))
    window, prompt = shared.data.heldout[0], shared.prompt
    reading = read_clock(result.plan, shared.decoder, window, prompt, rows=10**6, threads=1)
    assert (reading.rows, reading.threads, len(reading.layers)) == (len(window) - prompt, 1, 2)
    assert reading.dense_ms > 0 and reading.sparse_ms > 0
    loads = np.zeros(len(window), np.float32)
    loads[:prompt] = np.inf
    # Layer 0 alone is run on the same input in both: later ones see what the sparse layers before them made.
    first = replace(result.plan, layers=result.plan.layers[:1])
    active = ReferenceModel(shared.decoder, first).run(window.tolist(), loads).active[0, prompt:]
    layer = first.layers[0]
    alone = read_clock(first, shared.decoder, window, prompt, rows=10**6, threads=1)
    wanted = read_bytes(layer, first.score, float(active.mean()) / layer.width) / dense_bytes(layer)
    assert alone.bytes == pytest.approx(wanted, abs=1e-3)
    assert str(alone) == f"bytes say x{alone.bytes:.2f}, the clock says x{alone.clock:.2f} (1 layer, 1 thread)"


@pytest.mark.parametrize(
    ("kind", "policy", "dtype"),
    [("gpt2", "tt", "float16"), ("llama", "griffin", "bfloat16"), ("llama", "moefication", "float32")],
)
def test_the_clock_runs_every_kind_of_plan(kind: str, policy: str, dtype: str) -> None:
    shared = calibrator(kind)
    settings = PolicySettings(rows=200, granule=8 if policy == "moefication" else None)
    plan = shared.calibrate(get_policy(policy, settings), SOURCE, replace(LOOSE, sparsity=0.5)).plan
    reading = read_clock(plan, shared.decoder, shared.data.heldout[0], shared.prompt, dtype=dtype, layers=1)
    layer = next(layer for layer in plan.layers if layer.name == reading.layers[0])
    router = plan.tensors(layer).router
    parameters = 0 if router is None else router.parameters
    item = 4 if dtype == "float32" else 2
    wanted = read_bytes(layer, plan.score, 1.0 - layer.expected_sparsity, item, parameters) / dense_bytes(layer, item)
    assert reading.bytes == pytest.approx(wanted, abs=0.15)
    assert reading.clock > 0 and len(reading.layers) == 1


def test_a_wide_layer_is_faster_when_most_of_it_is_skipped() -> None:
    shared = calibrator(hidden_size=256, intermediate_size=8192)
    plan = shared.calibrate(POLICIES["griffin"], SOURCE, replace(LOOSE, sparsity=0.95)).plan
    reading = read_clock(plan, shared.decoder, shared.data.heldout[0], shared.prompt, threads=1)
    assert reading.bytes < 0.1
    assert reading.clock < 0.7


def test_the_clock_is_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = calibrator()
    plan = shared.calibrate(POLICIES["griffin"], SOURCE, replace(LOOSE, sparsity=0.5)).plan

    def clock(target: str) -> Callable[..., dict[str, Any]]:
        return plan_clock(shared.decoder, shared.data.heldout, shared.prompt, target=target, dtype="float32")

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "target trt" in clock("trt")(plan)["left_out"] and "no GPU" in clock("trt")(plan)["left_out"]
    monkeypatch.setenv("CLADA_ORT_LIBRARY", str(tmp_path / "missing.so"))
    with pytest.raises(BackendError):
        read_clock(plan, shared.decoder, shared.data.heldout[0], shared.prompt)
    assert "missing.so" in clock("ort")(plan)["left_out"]


# --- where it shows ---


def test_the_report_has_the_table(tmp_path: Path) -> None:
    shared = calibrator("gpt2")
    result = choose(shared, SOURCE, LOOSE, policies=TRAINING_FREE, clock=lambda plan: {"left_out": "no <library>"})
    write_report(tmp_path, {"model": "tiny", "plan": result.plan.to_dict(), "calibration": result.details})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Choice of the policy for kl=0.01" in page and "Not timed: no &lt;library&gt;." in page
    for name in TRAINING_FREE:
        assert f"<code>{name}</code>" in page
    assert '<span class="ok">chosen</span>' in page and "skipped: policy &#39;cats&#39; reads the gate" in page


def test_auto_from_the_command_line(
    model_folder: Callable[[str], Path], kept_traces: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [str(model_folder("llama")), "--target", "ort", "-o", str(out), "--policy", "auto", "--budget", "kl=0.01"]
    assert main_export([*command, "--calibration-context", "32", "--no-load-response", "--no-verify"]) == 0
    errors = capsys.readouterr().err
    plan = json.loads((out / "clada.json").read_text())["plan"]
    auto = plan["calibration"]["auto"]
    assert plan["policy"] == auto["chosen"] and not POLICIES[auto["chosen"]].trained
    assert auto["text"] in errors.replace("\n", " ")
    assert auto["clock"]["text"] in auto["text"] and auto["clock"]["text"].startswith("bytes say x0.")
    assert "Choice of the policy" in (out / "report.html").read_text(encoding="utf-8")


def test_training_is_for_auto(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--train is for --policy auto"):
        export("nowhere", tmp_path / "out", ExportOptions(policy="griffin", train=True))


class CountedMeter:
    """Counts the held-out windows that are run, by method."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.windows: Counter[str] = Counter()
        real = HeldOut.sparse

        def sparse(heldout: HeldOut, group: int, layers: MethodSelectors, *rest: Any) -> Any:
            self.windows[f"{layers.method.score} {layers.method.rule}"] += len(heldout.groups[group])
            return real(heldout, group, layers, *rest)

        patch.setattr(HeldOut, "sparse", sparse)


def test_a_policy_that_is_outdone_is_measured_where_it_would_read_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = CountedMeter(monkeypatch)
    shared = calibrator()
    griffin = {name: POLICIES[name] for name in ("griffin", "clada", "tt")}
    auto = choose(shared, SOURCE, LOOSE, policies=griffin).plan.calibration.to_dict()["auto"]
    rows, windows = rows_of(auto), len(shared.data.heldout)
    best = rows[auto["chosen"]]["relative_bytes"]
    for row in rows.values():
        if row["relative_bytes"] is None:
            assert (row["why"].startswith("reads x") and row["cost"] is None) or row["cost"] > 1
        else:
            assert row["relative_bytes"] >= best
    # What is outdone is measured once for each allocation, or not at all.
    outdone = {"griffin": "prefix topk", "clada": "shadow threshold", "tt": "exact threshold"}
    for name, kind in outdone.items():
        if rows[name]["relative_bytes"] is None:
            assert counted.windows[kind] <= 3 * windows
    assert any(row["relative_bytes"] is None for row in rows.values())


def test_what_reads_too_much_at_its_sparsest_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = CountedMeter(monkeypatch)
    shared = calibrator()
    with pytest.raises(OutdoneError, match=r"reads x0\.6\d\d at 95%, not fewer than x0\.500"):
        shared.calibrate(POLICIES["tt"], SOURCE, replace(LOOSE, rival=0.5))
    assert not counted.windows


def test_tables_of_all_policies_are_made_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = stage.run_statistics

    def counted(runner: Any, methods: Any, **rest: Any) -> Any:
        asked.append(len(methods))
        return real(runner, methods, **rest)

    monkeypatch.setattr(stage, "run_statistics", counted)
    together = choose(calibrator(), SOURCE, LOOSE, policies=TRAINING_FREE)
    assert asked == [5]
    alone = calibrator().calibrate(POLICIES[together.plan.policy], SOURCE, LOOSE)
    assert together.plan.layers == alone.plan.layers


def test_a_plan_says_what_it_costs_in_float32() -> None:
    model = tiny_model("llama", 0)
    data = load_calibration_data(None, 256, context=32)
    fast = Calibrator(TorchDecoder(model), data, fast=True).calibrate(POLICIES["clada"], SOURCE, LOOSE)
    exact = Calibrator(TorchDecoder(model), data, fast=False)
    layers = Selectors(exact.decoder.ffns, (method_of(fast.plan),)).layers[0]
    found = exact.meter.measure(layers, np.array([layer.threshold[0] for layer in fast.plan.layers]))
    np.testing.assert_allclose(fast.drift.kl, found.kl, atol=1e-6)
    assert LOOSE.keeps(fast.drift)


def method_of(plan: SparsityPlan) -> Method:
    return Method(plan.policy, plan.score, plan.rule, plan.layers, dict(plan.arrays))
