"""Jobs give the same to the bit wherever their windows run: each in a process of its own, in any order, from what was sent."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from clada_export.calibration import heldout
from clada_export.calibration.drift import Drift, DriftMeter
from clada_export.calibration.heldout import HeldOut
from clada_export.calibration.jobs import run_sensitivity, run_statistics
from clada_export.calibration.selector import Selectors
from clada_export.calibration.sensitivity import layer_sensitivity
from clada_export.calibration.statistics import collect_statistics
from clada_export.calibration.weights import FFNWeights
from clada_export.calibration.windows import Desk, InProcess, Job
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.methods.static import WeightPruning
from clada_export.plan.method import Method, draft_layers
from tests.tiny_models import tiny_model

PROMPT = 8
CALIBRATION, HELDOUT = torch.randint(3, 256, (8, 48), generator=torch.Generator().manual_seed(3)).split((4, 4))


@lru_cache(maxsize=1)
def model() -> TorchDecoder:
    """Whose FFNs are found, which takes a second; others are copies."""
    decoder = TorchDecoder(tiny_model("llama"))
    assert decoder.ffns
    return decoder


def desk(at_once: int | None = 1) -> Desk:
    decoder = copy.deepcopy(model())
    return Desk(decoder, CALIBRATION, HELDOUT, PROMPT, FFNWeights(decoder, CALIBRATION), at_once)


class Scattered:
    """Runs every window at a desk of its own, the last first; jobs and parts are sent as bytes."""

    def __init__(self, own: Desk) -> None:
        self.desk = own

    def run(self, job: Job[Any], windows: Sequence[int]) -> Iterator[Any]:
        sent, parts = pickle.dumps(job), {}
        for window in reversed(windows):
            other = desk(at_once=self.desk.at_once)
            assert other.weights is not None and self.desk.weights is not None
            other.weights.follow(self.desk.weights.pruning, self.desk.weights.adapters)
            parts[window] = pickle.dumps(pickle.loads(sent).open(other)(window))
        for window in windows:
            yield pickle.loads(parts[window])


@pytest.fixture
def methods() -> tuple[Method, ...]:
    ffns = desk().decoder.ffns
    return tuple(
        Method(score, score, "threshold", draft_layers(ffns, prior_gamma=gamma))
        for score, gamma in (("shadow", 0.0), ("gate", 0.5))
    )


def same(one: Drift, other: Drift) -> bool:
    arrays = ("nll", "dense_nll", "kl", "top1", "window")
    return one.sparsity == other.sparsity and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)


def test_sensitivity() -> None:
    here = desk()
    wanted = layer_sensitivity(here.decoder, CALIBRATION[:3, :32], seed=5)
    done: list[tuple[int, int]] = []
    found = run_sensitivity(Scattered(here), 3, 32, seed=5, progress=lambda *count: done.append(count))
    assert found == wanted and done == [(1, 3), (2, 3), (3, 3)]
    assert run_sensitivity(InProcess(here), 3, 32, seed=5) == wanted


def test_statistics(methods: tuple[Method, ...]) -> None:
    here = desk()
    wanted = collect_statistics(here.decoder, Selectors(here.decoder.ffns, methods), CALIBRATION, PROMPT)
    done: list[tuple[int, int]] = []
    found = run_statistics(Scattered(here), methods, progress=lambda *count: done.append(count))
    assert found.load == wanted.load and done == [(number, 4) for number in range(1, 5)]
    for mine, others in zip(found.tables, wanted.tables, strict=True):
        for one, other in zip(mine, others, strict=True):
            assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))


@pytest.mark.parametrize("at_once", [1, 3])
def test_drift_also_of_pruned_weights(methods: tuple[Method, ...], at_once: int) -> None:
    """The dense side is that of the weights as they were given, though a process first sees a window when they are pruned."""
    here = desk(at_once=at_once)
    assert len(HeldOut.at(here).groups) == {1: 4, 3: 2}[at_once]
    meters = [DriftMeter(here.decoder, HELDOUT, PROMPT, runner=runner) for runner in (InProcess(here), Scattered(here))]
    assert torch.equal(meters[0].signals, meters[1].signals)
    levels, multiplier = np.full(2, 0.4), torch.linspace(0.5, 2.0, HELDOUT.numel()).reshape(HELDOUT.shape)
    seen: list[Drift] = []
    for pruning in (None, WeightPruning.parse("wanda=0.5")):
        assert here.weights is not None
        here.weights.use(pruning)
        layers = Selectors(here.decoder.ffns, methods).layers[0]
        one, other = (meter.measure(layers, levels, multiplier) for meter in meters)
        assert same(one, other)
        seen.append(one)
    assert np.array_equal(seen[0].dense_nll, seen[1].dense_nll) and not np.array_equal(seen[0].kl, seen[1].kl)


def test_a_measurement_ends_early_at_the_same_window(methods: tuple[Method, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows fit into a batch; whoever runs them one by one asks after two as well whether they are enough."""
    monkeypatch.setattr(heldout, "LOGITS_LIMIT", 2 * 4 * (HELDOUT.shape[1] - PROMPT) * 256)
    found: list[Drift] = []
    asked: list[int] = []
    for at_once in (None, 1):
        here = desk(at_once=at_once)
        meter = DriftMeter(here.decoder, HELDOUT, PROMPT, runner=InProcess(here))
        layers = Selectors(here.decoder.ffns, methods).layers[0]

        def enough(drift: Drift) -> bool:
            asked.append(len(np.unique(drift.window)))
            return True

        found.append(meter.measure(layers, np.full(2, 0.4), enough=enough))
    assert asked == [2, 2]
    assert np.array_equal(found[0].window, found[1].window) and found[0].mean_kl == pytest.approx(found[1].mean_kl, rel=1e-4)
