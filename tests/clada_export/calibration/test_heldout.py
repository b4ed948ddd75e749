"""Held-out windows: in batches and from a prompt's cache they give what they give one by one and in one piece."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clada_export.calibration import heldout as module
from clada_export.calibration.allocation import Layers, allocate
from clada_export.calibration.axis import AXES
from clada_export.calibration.drift import DriftMeter, compare
from clada_export.calibration.heldout import HeldOut, groups_of
from clada_export.calibration.precision import has_fast_products, products
from clada_export.calibration.selector import MethodSelectors, Selectors
from clada_export.calibration.statistics import collect_statistics
from clada_export.calibration.teacher import Teacher
from clada_export.calibration.windows import Desk, InProcess
from clada_export.decoder.decoder import Decoder, DecoderOutput
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UnsupportedModelError
from clada_export.plan.method import Method, draft_layers
from tests.tiny_models import tiny_model

PROMPT, CONTEXT = 8, 32
WINDOWS = torch.randint(0, 256, (3, CONTEXT), generator=torch.Generator().manual_seed(3))
METHODS = [("shadow", "threshold", 0.1), ("gate", "threshold", 0.0), ("prefix", "topk", 0.0), ("prefix", "relative", 0.0)]


def selected(decoder: Decoder, score: str, rule: str, gamma: float) -> tuple[MethodSelectors, np.ndarray]:
    method = Method("test", score, rule, draft_layers(decoder.ffns, prior_gamma=gamma))
    selectors = Selectors(decoder.ffns, (method,))
    tables = collect_statistics(decoder, selectors, WINDOWS, PROMPT).tables[0]
    widths = tuple(layer.width for layer in method.layers)
    levels = allocate("sparsity", Layers(AXES[rule], tables, widths, (1.0,) * len(widths))).levels_for(0.5)
    return selectors.layers[0], levels


def meter(decoder: Decoder, at_once: int | None = None, **settings: Any) -> DriftMeter:
    desk = Desk(decoder, WINDOWS, WINDOWS, PROMPT, at_once=at_once)
    return DriftMeter(decoder, WINDOWS, PROMPT, runner=InProcess(desk), **settings)


@pytest.mark.parametrize(("score", "rule", "gamma"), METHODS)
def test_a_batch_from_a_cache_is_each_window_in_one_piece(
    score: str, rule: str, gamma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = TorchDecoder(tiny_model("llama", 0))
    layers, levels = selected(decoder, score, rule, gamma)
    multiplier = torch.rand(3, CONTEXT, generator=torch.Generator().manual_seed(1)) + 0.5
    found = meter(decoder).measure(layers, levels, multiplier)
    monkeypatch.setattr(HeldOut, "_can_go_on", lambda self, fast: False)
    alone = meter(decoder, 1)
    wanted = alone.measure(layers, levels, multiplier)
    np.testing.assert_allclose(found.nll, wanted.nll, atol=1e-4)
    np.testing.assert_allclose(found.kl, wanted.kl, atol=1e-5)
    np.testing.assert_array_equal(found.window, wanted.window)
    assert found.sparsity == pytest.approx(wanted.sparsity, abs=1e-3) and 0.2 < found.sparsity < 0.8
    assert found.mean_kl > 1e-4
    assert torch.allclose(meter(decoder).signals, alone.signals, atol=1e-4)


def test_the_prompt_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = TorchDecoder(tiny_model("llama", 0))
    layers, levels = selected(decoder, *METHODS[0])
    measuring = meter(decoder)
    measuring.measure(layers, levels)
    lengths: list[int] = []
    real = decoder.run

    def run(ids: torch.Tensor, **given: Any) -> DecoderOutput:
        lengths.append(ids.shape[1])
        return real(ids, **given)

    monkeypatch.setattr(decoder, "run", run)
    first = measuring.measure(layers, levels)
    assert lengths == [CONTEXT - PROMPT]
    # Weights that change in place make it run again, and the dense side stays that of the given ones.
    with torch.no_grad():
        decoder.ffns[0].down.weight.mul_(0.5)
    second = measuring.measure(layers, levels)
    assert lengths == [CONTEXT - PROMPT, PROMPT, CONTEXT - PROMPT]
    np.testing.assert_array_equal(first.dense_nll, second.dense_nll)
    assert second.mean_kl > 1.5 * first.mean_kl


class ForgetfulDecoder(TorchDecoder):
    """Takes a cache and does not use it."""

    def run(self, ids: torch.Tensor, *, cache: Any = None, **given: Any) -> DecoderOutput:
        return super().run(ids, **given)


class SingleRowDecoder(TorchDecoder):
    """Takes several tokens after a cache of one row only, as ONNX Runtime's GroupQueryAttention."""

    def run(self, ids: torch.Tensor, *, cache: Any = None, **given: Any) -> DecoderOutput:
        if cache is not None and len(ids) > 1:
            raise UnsupportedModelError("batch_size must be 1 when sequence_length > 1 and past context is given")
        return super().run(ids, cache=cache, **given)


@pytest.mark.parametrize("kind", [ForgetfulDecoder, SingleRowDecoder])
def test_a_cache_that_is_not_what_it_should_be_is_not_used(kind: type[TorchDecoder]) -> None:
    good, bad = TorchDecoder(tiny_model("llama", 0)), kind(tiny_model("llama", 0))
    layers, levels = selected(good, *METHODS[0])
    wanted = meter(good).measure(layers, levels)
    found = meter(bad).measure(*selected(bad, *METHODS[0]))
    np.testing.assert_allclose(found.nll, wanted.nll, atol=1e-4)
    np.testing.assert_allclose(found.kl, wanted.kl, atol=1e-5)


def test_groups_are_as_large_as_their_logits_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = TorchDecoder(tiny_model("llama", 0))
    assert groups_of(WINDOWS, PROMPT, decoder) == [[0, 1, 2]]
    monkeypatch.setattr(module, "LOGITS_LIMIT", 2 * 4 * (CONTEXT - PROMPT) * 256)
    assert groups_of(WINDOWS, PROMPT, decoder) == [[0, 1], [2]]
    assert groups_of(WINDOWS, PROMPT, decoder, 1) == [[0], [1], [2]]
    monkeypatch.setattr(module, "LOGITS_LIMIT", 1)
    assert groups_of(WINDOWS, PROMPT, decoder) == [[0], [1], [2]]
    # What a batch saves is reading weights: large ones allow more.
    monkeypatch.setattr(module, "LOGITS_LIMIT", 2**30)
    monkeypatch.setattr(module, "LOGITS_LEAST", 4 * (CONTEXT - PROMPT) * 256)
    weights = sum(ffn.w_in().nbytes + ffn.w_out().nbytes for ffn in decoder.ffns)
    assert len(groups_of(WINDOWS, PROMPT, decoder)[0]) == min(3, max(1, weights // 8 // (4 * (CONTEXT - PROMPT) * 256)))


def test_what_is_enough_ends_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS_LIMIT", 2 * 4 * (CONTEXT - PROMPT) * 256)
    decoder = TorchDecoder(tiny_model("llama", 0))
    layers, levels = selected(decoder, *METHODS[1])
    measuring = meter(decoder)
    whole = measuring.measure(layers, levels)
    part = measuring.measure(layers, levels, enough=lambda drift: len(set(drift.window)) == 2)
    assert set(part.window) == {0, 1} and set(whole.window) == {0, 1, 2}
    np.testing.assert_array_equal(part.kl, whole.upto(part).kl)


@pytest.mark.parametrize("held", [10**12, 0])
def test_a_comparison_is_kl_and_surprisal(held: int) -> None:
    rng = torch.Generator().manual_seed(0)
    dense, sparse = torch.randn(40, 300, generator=rng) * 5, torch.randn(40, 300, generator=rng) * 5
    targets = torch.randint(0, 300, (40,), generator=rng)
    # In memory or in a file, in one piece or in several.
    nll, dense_nll, kl, same = Teacher.of(dense, targets, held).compare(sparse, targets).double()
    p, q = dense.double().log_softmax(-1), sparse.double().log_softmax(-1)
    assert torch.allclose(kl, (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=1e-5)
    assert torch.allclose(nll, -q.gather(-1, targets[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(dense_nll, -p.gather(-1, targets[:, None])[:, 0], atol=1e-5)
    assert torch.equal(same, (dense.argmax(-1) == sparse.argmax(-1)).double())
    zero = compare(dense, dense, targets, 7)
    assert float(zero[2].max()) < 1e-5 and set(zero[4].tolist()) == {7.0} and float(zero[3].min()) == 1.0


def test_infinite_logits_cost_the_worst_and_not_nan() -> None:
    dense = torch.zeros(1, 8)
    for bad in (float("nan"), float("inf")):
        found = compare(dense, torch.full((1, 8), bad), torch.tensor([1]), 0)
        assert bool(torch.isfinite(found).all()) and float(found[0, 0]) == float(found[2, 0]) == 1e6


def test_precision_is_set_back_whatever_happens() -> None:
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    with pytest.raises(KeyError), products(True):
        assert setting.fp32_precision == "bf16"
        raise KeyError
    assert setting.fp32_precision == before
    with products(True), products(False):
        assert setting.fp32_precision == "ieee"
    assert setting.fp32_precision == before


@pytest.mark.skipif(not has_fast_products(), reason="this CPU has no products of bfloat16")
def test_fast_measurements_agree_within_their_error() -> None:
    decoder = TorchDecoder(tiny_model("llama", 0))
    layers, levels = selected(decoder, *METHODS[0])
    quick = meter(decoder, fast=True)
    fast, exact = quick.measure(layers, levels), quick.measure(layers, levels, exact=True)
    assert exact.nll.tolist() == meter(decoder).measure(layers, levels).nll.tolist()
    gain, error = fast.gain_over(exact)
    assert abs(gain) < error + 0.02 * exact.mean_kl


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2", "phi3"])
def test_models_whose_attention_is_short_are_looked_at_over_the_whole_text(kind: str) -> None:
    decoder = TorchDecoder(tiny_model(kind, 0))
    lengths: list[int] = []
    real = decoder.run

    def run(ids: torch.Tensor, **given: Any) -> DecoderOutput:
        lengths.append(ids.shape[1])
        return real(ids, **given)

    decoder.run = run  # type: ignore[method-assign]
    short = getattr(decoder.config, "sliding_window", None)
    layers, levels = selected(decoder, *METHODS[1])
    lengths.clear()
    found = meter(decoder).measure(layers, levels)
    assert (CONTEXT in lengths) == (short is not None and short < CONTEXT)
    assert PROMPT in lengths and found.mean_kl > 0
    wanted = meter(decoder, 1)
    HeldOut.at(wanted._runner.desk)._goes_on = False
    np.testing.assert_allclose(found.kl, wanted.measure(layers, levels).kl, atol=2e-5)
