"""Lory's router (arXiv 2405.03133) for a frozen dense FFN: weights of experts for a segment, from the segment before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clada_export.decoder.decoder import Decoder
from clada_export.errors import UsageError
from clada_export.methods.training.cluster import cluster_neurons
from clada_export.methods.training.train import (
    Progress,
    Stopwatch,
    TrainingReport,
    TrainingSettings,
    arrays,
    fit,
    input_size,
    linear_weight,
    no_progress,
    split_rows,
)
from clada_export.op.reference import SparseFFNTensors, activate
from graph_passes.op import SparseFFNAttributes
from graph_passes.router import Router

SEGMENT = 32
"""Tokens of a segment in training. Lory's are 256; shorter ones give more of them from the little text of a calibration."""
SETTINGS = TrainingSettings(epochs=8, batch=8, learning_rate=1e-2, patience=2)


@dataclass(frozen=True)
class Segments:
    """For every FFN and P pairs of neighbouring segments, float32: `means` [P, d], the mean input over the first segment, and
    `inputs` [P, r, d], inputs of r tokens of the second."""

    means: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        """P r, the tokens."""
        return self.inputs[0].shape[0] * self.inputs[0].shape[1]


def collect_segments(
    decoder: Decoder,
    windows: Tensor,
    rows: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Segments:
    """Cut the windows into segments, run the dense model once, and keep what the routers are trained on.

    Args:
        windows: int64 [W, context].
        rows: at most about so many tokens altogether, at least one a pair.
        seed: of the choice of tokens.

    Raises:
        UsageError: too little text for two pairs of segments, or an input that is not finite; names the layer.
    """
    count, context = windows.shape
    length = max(1, min(SEGMENT, context // 8))
    pairs = context // length - 1
    if pairs * count < 2:
        raise UsageError(f"merging experts: {count} windows of {context} tokens hold no two pairs of segments; give more text")
    taken = max(1, min(length, rows // (pairs * count)))
    generator = torch.Generator().manual_seed(seed)
    ffns = decoder.ffns
    means: list[list[Tensor]] = [[] for _ in ffns]
    inputs: list[list[Tensor]] = [[] for _ in ffns]
    places = torch.empty(0, dtype=torch.int64)

    def inner(index: int, x: Tensor, h: Tensor) -> None:
        segments = x.reshape(-1, x.shape[-1])[: (pairs + 1) * length].float().reshape(pairs + 1, length, -1)
        if not bool(torch.isfinite(segments).all()):
            raise UsageError(f"{ffns[index].name}: its inputs are not finite on the calibration text")
        means[index].append(segments[:-1].mean(1))
        inputs[index].append(segments[1:].gather(1, places.unsqueeze(-1).expand(-1, -1, segments.shape[-1])))

    with torch.no_grad(), decoder.tap(inner=inner):
        for done, window in enumerate(windows):
            places = torch.rand(pairs, length, generator=generator).argsort(1)[:, :taken]
            decoder.logits(window)
            progress(done + 1, count)
    return Segments(tuple(torch.cat(parts) for parts in means), tuple(torch.cat(parts) for parts in inputs))


def merge_order(w_in: Tensor, experts: int, seed: int = 0, *, name: str = "FFN") -> np.ndarray:
    """Order the neurons so that each f / E neighbours are an expert.

    Experts are clusters (`cluster_neurons`). Which neuron of one expert meets which of another is left to chance: groups of
    neurons that are alike, spread over the experts, make the mean better with even weights, but leave the router nothing to
    choose between, and the rebuilt output is worse (SmolLM2-135M, three layers: mean error 0.59-0.69 against 0.47-0.66).

    Args:
        w_in: float32 [f, n, d].

    Returns:
        int64 [f], a permutation: expert e is `order[e * g : (e + 1) * g]`.

    Raises:
        UsageError: as `cluster_neurons`.
    """
    return cluster_neurons(w_in, w_in.shape[0] // experts, seed, name=name)


def train_lory(
    means: Tensor,
    inputs: Tensor,
    tensors: SparseFFNTensors,
    attributes: SparseFFNAttributes,
    experts: int,
    *,
    name: str = "FFN",
    settings: TrainingSettings = SETTINGS,
    progress: Progress = no_progress,
) -> tuple[Router, TrainingReport]:
    """Linear(d, E) without bias and a softmax on a segment's mean input; y = scale * merged FFN(x) for the next segment.

    loss = the mean over tokens of ||y' - y||^2 / ||y||^2, y the dense FFN's output without its bias (own derivation: Lory
    trains experts and router together on the language-model loss; here the model is frozen and little can be hoped for). The
    scale starts at E, where E equal neurons of weight 1 / E each add up to what they were, and is learnt with the router.

    Args:
        means: float32 [P, d]; inputs: float32 [P, r, d], of `Segments`.
        tensors: of the FFN, float32, neurons in the order of `merge_order`.
        attributes: of the FFN.

    Returns:
        The router, and a report with the metrics `error` (mean of ||y' - y|| / ||y|| on the held-out segments), `even` (the
        same with even weights and the same scale) and `scale`.

    Raises:
        UsageError: the FFN's activations are not finite.
    """
    watch = Stopwatch()
    pairs, rows, hidden_size = inputs.shape
    f, n, _ = tensors.w_in.shape
    granule = f // experts
    w_out = tensors.w_out.reshape(experts, granule, hidden_size)
    with torch.no_grad():
        # Merging weights and merging what they give are the same before the activation, so x meets the weights only once.
        before = torch.einsum("prd,fnd->pnrf", inputs, tensors.w_in)
        for index, bias in enumerate((tensors.gate_bias, tensors.up_bias) if n == 2 else (tensors.up_bias,)):
            if bias is not None:
                before[:, index] += bias
        hidden = _hidden(before, attributes)
        y = hidden @ tensors.w_out
        energy = y.square().sum(-1)
        if not bool(torch.isfinite(energy).all()):
            raise UsageError(f"{name}: its activations are not finite on the calibration text; the model is broken in float32")
        energy = energy.clamp(min=float(energy.mean()) * 1e-3 + 1e-30)
        before = before.reshape(pairs, n, rows, experts, granule)
        del hidden
    size = input_size(means)
    scaled = means / size
    weight = linear_weight(experts, hidden_size, torch.Generator().manual_seed(settings.seed)) * 0.1
    log_scale = torch.tensor(math.log(experts))

    def squared(segments: Tensor, share: Tensor) -> Tensor:
        merged = _hidden(torch.einsum("pnreg,pe->pnrg", before[segments], share), attributes)
        each = torch.einsum("prg,egd->pred", merged, w_out)
        found = torch.einsum("pred,pe->prd", each, share) * log_scale.exp()
        return (found - y[segments]).square().sum(-1) / energy[segments]

    def shares(segments: Tensor) -> Tensor:
        return functional.linear(scaled[segments], weight).softmax(-1)

    def loss(segments: Tensor) -> Tensor:
        return squared(segments, shares(segments)).mean()

    fitted = fit((weight, log_scale), loss, lambda segments: -float(loss(segments)), pairs, settings, progress)
    _, heldout = split_rows(pairs, settings.seed)
    scale = float(log_scale.exp())
    with torch.no_grad():
        even = torch.full((len(heldout), experts), 1.0 / experts)
        metrics = {
            "error": float(squared(heldout, shares(heldout)).sqrt().mean()),
            "even": float(squared(heldout, even).sqrt().mean()),
            "scale": scale,
        }
    return Router(arrays(weight / size), (None,), output="softmax", scale=scale), watch.report(fitted, metrics)


def _hidden(before: Tensor, attributes: SparseFFNAttributes) -> Tensor:
    """The hidden activation [P, r, ..] of pre-activations [P, n, r, ..]."""
    activated = activate(attributes.activation, before[:, 0])
    return activated * before[:, 1] if attributes.gated else activated
