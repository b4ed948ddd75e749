"""Quality of a plan on held-out text, in eager PyTorch with masks: the prompt dense, every later token sparse, as engines run.

Like `clada_export.calibration.drift.DriftMeter`, and beside it each layer's sparsity, and methods that no plan can say (TEAL).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clada_export.calibration.axis import Axis
from clada_export.calibration.drift import Drift, compare, drift_of
from clada_export.calibration.load_response import multiplier_of
from clada_export.calibration.segment_state import measure_segment_state
from clada_export.calibration.selector import LayerSelector, Selectors, decide
from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn import EagerFFN
from clada_export.decoder.tap import FFNTap
from clada_export.errors import UsageError
from clada_export.load.surprisal import surprisal_entropy
from clada_export.plan.layer import LayerPlan
from clada_export.plan.method import Method
from clada_export.plan.plan import SparsityPlan

Decode = Callable[[int, int, Tensor, Tensor], tuple[Tensor, float]]
"""(window, layer, x [rows, d], h [rows, f]) of a whole window: what the hidden activations of the tokens after the prompt
become [rows - prompt, f], and the share of the layer that ran for them."""

CHUNK = 64
"""Tokens that are compared at a time: with 262144 entries a vocabulary's float32 logits are 1 MB a token."""


@dataclass(frozen=True)
class Found:
    """Drift on the held-out text, and the share that each layer skipped, float64 [layers]."""

    drift: Drift
    layer_sparsity: np.ndarray


class HeldOut:
    """Held-out windows with the dense model's logits, which are computed once and kept in a temporary file.

    Args:
        decoder: dense, as it is now; later its weights may be pruned.
        windows: int64 [N, context].
        prompt: tokens of every window that run dense, at least 1.
        folder: where the file goes: N x (context - prompt) x vocabulary x 4 bytes.
    """

    def __init__(self, decoder: Decoder, windows: Tensor, prompt: int, folder: Path) -> None:
        self._decoder, self._windows = decoder, windows
        self.prompt = prompt
        signals: list[Tensor] = []
        dense: np.memmap[tuple[int, ...], np.dtype[np.float32]] | None = None
        with torch.inference_mode():
            for index, window in enumerate(windows):
                logits = self._logits(window)
                if dense is None:
                    shape = (len(windows), windows.shape[1] - prompt, logits.shape[-1])
                    # No name remains in the folder: the file goes when this process does.
                    with tempfile.NamedTemporaryFile(dir=folder) as file:
                        dense = np.memmap(file.name, dtype=np.float32, mode="w+", shape=shape)
                dense[index] = logits[prompt:].numpy()
                # By rows: the softmax of a window of a large vocabulary takes gigabytes.
                rows = zip(logits[:-1].split(CHUNK), window[1:].split(CHUNK), strict=True)
                parts = [torch.stack(surprisal_entropy(part, tokens)) for part, tokens in rows]
                signals.append(torch.cat(parts, dim=-1))
        if dense is None:
            raise UsageError("held-out text: there is no window")
        self._dense = dense
        self.signals = torch.stack(signals)
        """Surprisal and entropy of every token but the first, float32 [N, 2, context - 1]."""

    def measure(self, decode: Decode | None, step: Callable[[], None] = lambda: None) -> Found:
        """Run the model over the windows.

        Args:
            decode: what sparse tokens compute; None runs the model as it is now (pruned weights).
            step: called after every window.
        """
        prompt, ffns = self.prompt, self._decoder.ffns
        active = np.zeros(len(ffns))

        def inner(window: int, index: int, x: Tensor, h: Tensor) -> Tensor:
            assert decode is not None
            rows = h.reshape(-1, h.shape[-1])
            remaining, share = decode(window, index, x.reshape(-1, x.shape[-1]), rows)
            active[index] += share
            return torch.cat((rows[:prompt], remaining)).reshape(h.shape)

        def tap(window: int) -> FFNTap:
            return self._decoder.tap(inner=partial(inner, window) if decode is not None else None)

        drift = self.through(tap, step)
        skipped = np.zeros(len(ffns)) if decode is None else 1.0 - active / len(self._windows)
        widths = [ffn.intermediate_size for ffn in ffns]
        return Found(replace(drift, sparsity=float(np.average(skipped, weights=widths))), skipped)

    def through(self, tap: Callable[[int], FFNTap], step: Callable[[], None] = lambda: None) -> Drift:
        """As `DriftMeter.through`, with the dense logits of a whole text on disk and compared by rows."""
        parts: list[Tensor] = []
        prompt = self.prompt
        with torch.inference_mode():
            for current, window in enumerate(self._windows):
                with tap(current):
                    sparse = self._logits(window)[prompt:]
                for start in range(0, len(sparse) - 1, CHUNK):
                    stop = min(start + CHUNK, len(sparse) - 1)
                    dense = torch.from_numpy(np.array(self._dense[current, start:stop]))
                    targets = window[prompt + 1 + start : prompt + 1 + stop]
                    parts.append(compare(dense, sparse[start:stop], targets, current))
                step()
        return drift_of(parts, 0.0)

    def _logits(self, window: Tensor) -> Tensor:
        return self._decoder.logits(window).float()


def merged_quality(heldout: HeldOut, ffns: Sequence[EagerFFN], plan: SparsityPlan) -> Found:
    """Of a plan that merges experts: no mask, but another FFN after the prompt. The share that is not run is 1 - 1 / E."""
    method = Method(plan.policy, plan.score, plan.rule, plan.layers, arrays=dict(plan.arrays))
    drift = measure_segment_state(heldout, ffns, method).drift
    skipped = np.array([1.0 - 1.0 / (layer.merge or 1) for layer in plan.layers])
    return Found(replace(drift, sparsity=float(np.average(skipped, weights=[layer.width for layer in plan.layers]))), skipped)


class PlanDecoder:
    """A plan's decision, as the op makes it.

    Args:
        signals: surprisal and entropy of the held-out tokens (`HeldOut.signals`), for plans that respond to the load. An
            engine takes them from its own, sparse, logits.
        prompt: tokens of a window that are its prompt.

    Raises:
        UsageError: a layer that the plan leaves out.
    """

    def __init__(self, ffns: Sequence[EagerFFN], plan: SparsityPlan, signals: Tensor, prompt: int) -> None:
        layers = [plan.layer(ffn.name) for ffn in ffns]
        planned = tuple(layer for layer in layers if layer is not None)
        if len(planned) != len(ffns):
            missing = next(ffn.name for ffn, layer in zip(ffns, layers, strict=True) if layer is None)
            raise UsageError(f"the plan has no layer {missing!r}")
        method = Method(plan.policy, plan.score, plan.rule, planned, arrays=dict(plan.arrays))
        self._selectors: tuple[LayerSelector, ...] = Selectors(ffns, [method]).layers[0]
        self._levels = [level_of(selector.axis, plan.rule, selector.layer) for selector in self._selectors]
        self._prompt = prompt
        responds = plan.load.surprisal_weight != 0.0 or plan.load.entropy_weight != 0.0
        self._multiplier = multiplier_of(plan.load, signals, signals.shape[-1] + 1) if responds else None

    def __call__(self, window: int, index: int, x: Tensor, h: Tensor) -> tuple[Tensor, float]:
        """See `Decode`."""
        selector, level = self._selectors[index], self._levels[index]
        selection = decide(selector, x, h, self._prompt)
        if self._multiplier is not None:
            level = selector.axis.moved(level, self._multiplier[window, self._prompt :].unsqueeze(-1))
        remaining, keep = selector.hidden(h[self._prompt :], selection, level)
        return remaining, float(keep.float().mean())


def level_of(axis: Axis, rule: str, layer: LayerPlan) -> Tensor:
    """The level, float32 [1] or [E], of a plan's thresholds: the inverse of `Axis.threshold`."""
    threshold = torch.tensor(layer.threshold, dtype=torch.float32)
    if rule != "topk":
        return threshold
    # Half a place below the k-th best, so that rounding can't decide.
    return 1.0 - (threshold + 0.5) / (layer.width // layer.granule)
