"""The formats are what they say, a budget is kept, and a simulated model with exact FFNs is the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from benchmarks.frontier import distortion
from benchmarks.frontier.__main__ import main
from benchmarks.frontier.blocks import fit, super_block
from benchmarks.frontier.compensate import codes_of
from benchmarks.frontier.families import BASE, FAMILIES, ROUND, Cell, family
from benchmarks.frontier.ffn import Exact, Kitchen
from benchmarks.frontier.grids import Grid, round_input
from benchmarks.frontier.llama import LlamaFormat
from benchmarks.frontier.model import Plan, Simulation, Yardstick
from benchmarks.frontier.page import main as page_main
from benchmarks.frontier.page import normal
from benchmarks.frontier.read import bits_at, envelope, megabytes, points
from benchmarks.frontier.tables import Choice, choices, share_out
from benchmarks.frontier.turn import Turn
from benchmarks.markers import BEGIN, END
from clada_export.decoder.torch_decoder import TorchDecoder
from tests.benchmarks.tiny import write_tiny_llama
from tests.tiny_models import tiny_model

GRIDS = [
    replace(ROUND, low=low, offset=offset, scales=scales, search=search)
    for low in (0, 2)
    for offset in (True, False)
    for scales in ("f16", "super")
    for search in (True, False)
]


def _weights(rows: int = 48, row: int = 256, seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(rows, row, generator=torch.Generator().manual_seed(seed))


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def test_a_super_block_divides_the_row() -> None:
    assert [super_block(row, 32) for row in (1536, 576, 640, 64)] == [256, 192, 160, 64]
    assert super_block(576, 16) == 192


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_planes_refine_each_other(grid: Grid) -> None:
    weights = _weights()
    scale, low = grid.levels_of(weights)
    codes = grid.nearest(weights, scale, low)
    full = grid.decode(codes, scale, low)
    # Normal weights in blocks of 32: 4 bits leave about a tenth, 6 bits a quarter of that.
    assert _error(full, weights) < (0.12 if grid.bits == 4 else 0.035)
    assert int(codes.max()) < 1 << grid.bits
    high = grid.decode_high(codes, scale, low)
    assert torch.equal(high, full) == (grid.low == 0)
    assert _error(high, weights) < 0.13


@pytest.mark.parametrize("offset", [True, False])
def test_a_search_is_no_worse_than_the_range(offset: bool) -> None:
    weights = _weights()
    errors = []
    for search in (False, True):
        grid = replace(ROUND, offset=offset, search=search)
        scale, low = grid.levels_of(weights)
        errors.append(_error(grid.decode(grid.nearest(weights, scale, low), scale, low), weights))
    assert errors[1] < 0.97 * errors[0]


def test_blocks_of_zeros_stay_zero() -> None:
    for grid in GRIDS:
        weights = torch.zeros(2, 64)
        scale, low = grid.levels_of(weights)
        assert not grid.decode(grid.nearest(weights, scale, low), scale, low).any()


def test_fit_to_the_high_plane_keeps_it() -> None:
    weights = _weights()
    coarse, fine = BASE, replace(BASE, low=2, fit_high=True)
    scale, low = coarse.levels_of(weights)
    wanted = coarse.decode(coarse.nearest(weights, scale, low), scale, low)
    scale, low = fine.levels_of(weights)
    found = fine.decode_high(fine.nearest(weights, scale, low), scale, low)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_symmetric_grid_has_a_zero() -> None:
    scale, low = fit(_weights(), 32, 16, False, True)
    torch.testing.assert_close(low + 8 * scale, torch.zeros_like(scale))


def test_bits_count_scales() -> None:
    assert ROUND.overhead(576) == 1.0
    assert replace(ROUND, offset=False).overhead(576) == 0.5
    assert BASE.overhead(1536) == 0.5
    assert LlamaFormat("Q4_K").bits(1536) == 4.5
    assert LlamaFormat("Q5_K").bits(1536) == 5.5
    assert LlamaFormat("Q6_K").bits(1536) == 6.5625
    assert LlamaFormat("Q8_0").bits(576) == 8.5


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_llamas_plain_formats_are_those_of_gguf(name: str) -> None:
    weights, kind = _weights(), GGMLQuantizationType[name]
    wanted = torch.from_numpy(dequantize(quantize(weights.numpy(), kind), kind))
    found = LlamaFormat(name)(weights)
    # The two round halves differently, which a few weights in thousands meet.
    assert ((found - wanted).abs() > 1e-6).float().mean() < 2e-3


@pytest.mark.parametrize(("name", "size", "scales"), [("Q4_K", 144, 2), ("Q5_K", 176, 2), ("Q6_K", 210, 1)])
def test_weights_on_a_super_blocks_grid_survive(name: str, size: int, scales: int) -> None:
    """Random blocks of the format, as gguf decodes them, come back from quantisation: the grids are those of the format."""
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 256, (64, size), dtype=np.uint8)
    half = np.array([0.01, 0.02][:scales], dtype=np.float16).view(np.uint8)
    if name == "Q6_K":
        raw[:, -2:] = half
    else:
        raw[:, :4] = half
    weights = torch.from_numpy(dequantize(raw, GGMLQuantizationType[name])).float()
    other = _weights(64, 256) * float(weights.std()) / 0.05
    found = LlamaFormat(name)
    assert _error(found(weights), weights) < 0.6 * _error(found(other), other)


def test_compensation_lowers_the_error_of_the_product() -> None:
    generator = torch.Generator().manual_seed(1)
    # Inputs with a few strong directions, as activations have.
    mix = torch.randn(64, 64, generator=generator) * torch.linspace(3, 0.1, 64)
    inputs = torch.randn(512, 64, generator=generator) @ mix
    for weights, down in ((_weights(96, 64), False), (_weights(64, 96), True)):
        scale, low = BASE.levels_of(weights)
        nearest = BASE.decode(BASE.nearest(weights, scale, low), scale, low)
        codes = codes_of(BASE, weights, scale, low, inputs, "layer", down)
        made = BASE.decode(codes, scale, low)
        errors = [_error(inputs @ (w if down else w.t()), inputs @ (weights if down else weights.t())) for w in (nearest, made)]
        assert int(codes.max()) <= 15
        assert errors[1] < 0.8 * errors[0]


def test_inputs_are_rounded_to_127_steps_a_block() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    blocks = round_input(x).view(5, 2, 32)
    unit = x.view(5, 2, 32).abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close((blocks / unit).round(), blocks / unit, rtol=0, atol=1e-3)
    assert (round_input(x) - x).abs().max() <= 0.51 * unit.max()


def _exact(seed: int = 0) -> Exact:
    return Exact("ffn", "silu", 20 * _weights(192, 64, seed), 20 * _weights(96, 64, seed + 1))


def test_two_thresholds_read_what_they_say(tmp_path: Path) -> None:
    exact, x = _exact(), torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    made = Kitchen(tmp_path, None).quantised(0, exact, replace(BASE, low=4))
    full, high, score = made.score(x)
    none = torch.zeros(32, dtype=torch.bool)
    ordered = score.flatten().sort().values
    drop, refine = float(ordered[len(ordered) // 4]), float(ordered[len(ordered) // 2])
    result = made.output(full, high, score, drop, refine, none)
    assert abs(float(result.whole.mean()) - 0.5) < 0.01
    assert abs(float(result.medium.mean()) - 0.25) < 0.01
    # The high planes of gate and up for all and their low ones for a half; down: high for three quarters, low for a half.
    over = BASE.overhead(64)
    assert made.bits(0.5, 0.25) == pytest.approx((2 * (4 + over + 2) + (4 + over) * 0.75 + 2) / 3)
    wanted = (torch.where(score >= refine, full, 0.0) @ made.down) + (
        torch.where((score >= drop) & (score < refine), high, 0.0) @ made.high_down
    )
    torch.testing.assert_close(result.y, wanted)
    everything = made.output(full, high, score, drop, refine, ~none)
    torch.testing.assert_close(everything.y, full @ made.down)
    assert bool((everything.whole == 1).all())


def test_a_budget_is_shared_by_price(tmp_path: Path) -> None:
    kitchen, x = Kitchen(tmp_path, None), torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    tables = []
    for seed in (0, 1):
        exact = _exact(seed)
        tables.append(choices(exact, [(0, kitchen.quantised(0, exact, replace(BASE, low=2)))], x, "two"))
    for bits in (4.8, 5.0, 5.3):
        chosen = share_out(tables, [1.0, 1.0], bits)
        assert bits - 0.3 < sum(choice.bits for choice in chosen) / 2 <= bits
    dear = share_out(tables, [3.0, 1.0], 5.0)
    assert dear[0].bits > dear[1].bits
    # Too small a budget: the least that there is.
    least = share_out(tables, [1.0, 1.0], 1.0)
    assert [choice.bits for choice in least] == [min(choice.bits for choice in table) for table in tables]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("turned", [True, False])
def test_exact_ffns_are_the_model(kind: str, turned: bool, tmp_path: Path) -> None:
    model = tiny_model(kind)
    windows = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=windows).logits
    ffns = TorchDecoder(model).ffns
    simulation = Simulation(model, ffns, Turn(64, 0, 16) if turned else None)
    kitchen = Kitchen(tmp_path, None)
    fine = Plan((Grid(4, 4),), (Choice(0, 0.0, 0.0, 0.0, 0.0),) * 2)
    coarse = Plan((Grid(4),), (Choice(0, 0.0, 0.0, 0.0, 0.0),) * 2)
    states, reads = simulation.states(windows, 8, [None, fine, coarse], kitchen)
    with torch.inference_mode():
        found = simulation.head(states[0])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    yardstick = Yardstick(simulation.head, states[0], windows, 8)
    kl = [yardstick.compare(one)["kl"] for one in states]
    assert kl[0] < 1e-9 < kl[1] < 0.2 * kl[2]
    assert yardstick.compare(states[0])["tokens"] == 2 * (24 - 9)
    assert [read.bits for read in reads] == [32.0, 9.0, 5.0]


@pytest.mark.parametrize("block", [None, 16])
def test_a_turn_comes_back_and_keeps_products(block: int | None) -> None:
    turn, x, w = Turn(64, 3, block), _weights(5, 64), _weights(7, 64, 1)
    torch.testing.assert_close(turn.back(turn(x)), x)
    torch.testing.assert_close(turn(x) @ turn(w).t(), x @ w.t())
    assert _error(turn(x), x) > 1


def test_attention_comes_back(tmp_path: Path) -> None:
    model = tiny_model("llama")
    simulation = Simulation(model, TorchDecoder(model).ffns, Turn(64, 0, 16))
    before = model.model.layers[0].self_attn.o_proj.weight
    with simulation.attention_in(LlamaFormat("Q8_0")):
        inside = model.model.layers[0].self_attn.o_proj.weight
        assert 0 < _error(inside, before) < 0.01
    assert model.model.layers[0].self_attn.o_proj.weight is before


def test_families_are_told_apart() -> None:
    names = [one.name for one in FAMILIES]
    assert len(set(names)) == len(names)
    assert family("Q4_K").single and not family("4 search, one").single
    assert Cell("Q4_K").key == ["Q4_K", None, None, None]


def test_cells_are_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(chr(97 + (7 * i * i) % 26) for i in range(600)))
    command = [str(tmp_path / "model"), "--name", "tiny", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    command += ["--text", str(tmp_path / "text.txt"), "--context", "64", "--prompt", "16", "--windows", "2"]
    command += ["--families", "Q4_K", "4+2 compensated, two", "--budgets", "5"]
    command += ["--whole", "exact,Q8_0,exact", "exact,exact,Q6_K", "4+2 compensated, two@5.5,Q8_0,Q6_K"]
    assert main(command) == 0
    found = json.loads((tmp_path / "frontier-tiny.json").read_text())
    cells = {tuple(cell["key"]): cell for cell in found["cells"]}
    assert len(cells) == 5
    assert cells["4+2 compensated, two", 5.0, None, None]["bits"]["ffn"] == pytest.approx(5, abs=0.4)
    assert 0 < cells[None, None, "Q8_0", None]["kl"] < cells["Q4_K", None, None, None]["kl"]
    assert cells[None, None, None, "Q6_K"]["bits"]["head"] == LlamaFormat("Q6_K").bits(64)
    capsys.readouterr()
    assert main(command) == 0
    assert "nothing is missing" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) != 0
    assert "settings" in capsys.readouterr().err
    assert main([*command, "--whole", "Q4_K"]) != 0
    assert "FFN@BITS,ATTENTION,HEAD" in capsys.readouterr().err
    assert main([*command[:-4], "--families", "no such"]) != 0
    assert "no curve is called" in capsys.readouterr().err


def _result(cells: list[tuple[str, float | None, float, float]]) -> dict[str, Any]:
    quality = {"kl_error": 0.001, "ppl_increase": 0.01, "ppl_increase_error": 0.002, "top1": 0.9, "dense_ppl": 20.0}
    return {
        "key": {
            "model": {"name": "m"},
            "texts": [{"name": "t", "windows": 2, "window_tokens": 64}],
            "settings": {"prompt": 16, "rotated": True, "precision": "bf16"},
        },
        "sizes": {"layers": 2, "hidden_size": 64, "intermediate_size": 96, "ffn": 8e6, "attention": 4e6, "head": 2e6},
        "machine": {"cpu": "c", "threads": 2},
        "commit": "0123456789abcdef",
        "cells": [
            {"key": [name, budget, None, None], "bits": {"ffn": bits, "attention": 16, "head": 16}, "kl": kl}
            | {"whole": 0.4, "medium": 0.1, "predicted_kl": 0.02}
            | quality
            for name, budget, bits, kl in cells
        ],
    }


def test_bits_at_equal_kl() -> None:
    # Straight in log KL: from 0.08 to 0.02 in 2 bits, so 0.04 lies in the middle. The point above the line is not on the hull.
    result = _result([("Q4_K", None, 4.0, 0.08), ("Q5_K", None, 5.0, 0.06), ("Q6_K", None, 6.0, 0.02)])
    found = points(result)
    assert [point.family for point in envelope(found)] == ["Q4_K", "Q6_K"]
    assert bits_at(found, 0.04) == pytest.approx(5.0)
    assert bits_at(found, 0.02) == pytest.approx(6.0)
    assert bits_at(found, 0.01) is None and bits_at(found, 0.1) is None
    assert megabytes(result, {"ffn": 4, "attention": 8, "head": 16}) == pytest.approx(4 + 4 + 4)


def test_errors_on_normal_weights_say_what_a_format_is_worth() -> None:
    found = distortion.measure(32, 256)
    one = {item["name"]: item for item in found["one"]}
    assert one["4 offset f16"]["worth"] == 0
    # The same bits, and a better way to find scales.
    for name in ("4 symmetric f16", "5 offset f16"):
        assert one[f"{name} search"]["error"] < one[name]["error"]
        assert one[f"{name} search"]["worth"] > one[name]["worth"]
    assert all(item["error"] < item["high"] for item in found["two"])
    assert "4+2 symmetric super search" in normal(found)


def test_the_page_is_made_of_results(tmp_path: Path) -> None:
    dense = [("Q4_K", None, 4.5, 0.06), ("Q6_K", None, 6.5, 0.01)]
    result = _result([*dense, ("4+2 search, two", 4.0, 4.0, 0.06), ("4+2 search, two", 5.0, 5.0, 0.015)])
    result["cells"].append(result["cells"][0] | {"key": ["Q4_K", None, "Q8_0", "Q6_K"]})
    (tmp_path / "frontier-m.json").write_text(json.dumps(result))
    path = tmp_path / "page.md"
    path.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    assert page_main(["--check"], tmp_path, path) == 1
    assert page_main([], tmp_path, path) == 0
    assert page_main(["--check"], tmp_path, path) == 0
    text = path.read_text()
    assert "4+2 search, two" in text and "frontier-m.svg" in text and text.endswith("after\n")
    wanted = bits_at([point for point in points(result) if point.group == "skip"], 0.05)
    ratio = wanted / bits_at([point for point in points(result) if point.group == "users"], 0.05)
    assert f"{wanted:.2f} ({ratio:.2f})" in text
    assert (tmp_path / "frontier-m.svg").read_text().count("<svg") == 1
