"""Prune the FFNs of an eager model from the first to the last, in one pass of the model over the calibration text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn import EagerFFN
from clada_export.decoder.ffn.projections import FFNProjection, Snapshot, hidden, projections
from clada_export.errors import UnsupportedModelError, UsageError
from clada_export.methods.prune_spec import NEURONS, PruneSpec
from clada_export.methods.static import sparsegpt, wanda
from clada_export.methods.static.statistics import product_error, relative_error, require_finite

_PRUNERS = {"wanda": wanda.pruner, "sparsegpt": sparsegpt.pruner}
_NEURON_REMOVERS = {"wanda": wanda.remove_neurons, "sparsegpt": sparsegpt.remove_neurons}
_TRIAL_TOKENS = 8


@dataclass(frozen=True)
class ProjectionReport:
    """One weight matrix: the share of zeros, and ||X (W' - W)^T|| / ||X W^T|| on the rows X that it was pruned with.

    X of the down projection comes from the pruned gate and up projections, but from the whole ones where neurons go. Biases are
    left out.
    """

    name: str
    zeros: float
    error: float


@dataclass(frozen=True)
class LayerReport:
    """One FFN: its projections (gate, up, down), ||FFN'(x) - FFN(x)|| / ||FFN(x)|| without the down bias, and seconds."""

    name: str
    projections: tuple[ProjectionReport, ...]
    error: float
    seconds: float


@dataclass(frozen=True)
class PruneReport:
    """What was done.

    `layers` are in the order in which the model runs them. `kept` maps an FFN's name to the ascending indices of the neurons
    that are left, int64; it is empty unless whole neurons went. `tokens` counts calibration tokens.
    """

    spec: PruneSpec
    layers: tuple[LayerReport, ...]
    kept: Mapping[str, np.ndarray]
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings for a JSON report; of `kept` only the counts."""
        return {
            "spec": str(self.spec),
            "method": self.spec.method,
            "pattern": self.spec.pattern,
            "sparsity": self.spec.sparsity,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "layers": [
                {
                    "name": layer.name,
                    "error": layer.error,
                    "seconds": layer.seconds,
                    "projections": {item.name: {"zeros": item.zeros, "error": item.error} for item in layer.projections},
                    **({"kept_neurons": len(self.kept[layer.name])} if layer.name in self.kept else {}),
                }
                for layer in self.layers
            ],
        }


@dataclass(frozen=True)
class WeightPruning:
    """A pruning that calibration applies, and restores the weights after (`clada_export.calibration.weights`)."""

    spec: PruneSpec

    @classmethod
    def parse(cls, text: str) -> WeightPruning:
        """As `PruneSpec.parse`; `str` gives the same form back.

        Raises:
            UsageError: as `PruneSpec.parse`.
        """
        return cls(PruneSpec.parse(text))

    def apply(
        self, decoder: Decoder, windows: Tensor, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> PruneReport:
        """See `prune`."""
        return prune(decoder, windows, self.spec, progress)

    def __str__(self) -> str:
        return str(self.spec)


def prune(
    decoder: Decoder,
    windows: Tensor,
    spec: PruneSpec,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PruneReport:
    """Prune the FFN weights of a decoder in place.

    The windows run as one batch, and every FFN is pruned when the batch reaches it; the batch goes on with the pruned FFN. So
    the inputs of each FFN come from the pruned ones before it, and those of its down projection from its pruned gate and up
    projections. Only one FFN's activations and Hessian are in memory: about five arrays [tokens, f], for SparseGPT up to four
    [f, f] (float64 for neurons), and a copy of all FFN weights for the case that something fails. FFNs that share their weights
    are pruned once, when the last of them is reached, with the inputs of all.

    Nothing is random: equal inputs give equal weights on the same machine.

    Args:
        decoder: float32.
        windows: token ids, int64 [N, context].
        progress: called with (FFNs done, FFNs in all).

    Returns:
        The report. With the pattern `neurons`, the gate, up, their bias and down weights of removed neurons are zero.

    Raises:
        UsageError: a width that n:m does not divide, activations that are not finite, a Hessian that can't be factorised, an
            FFN that does not run on text; each names the layer. The weights are then what they were.
        UnsupportedModelError: FFNs that share some of their weights and not others.
    """
    start = time.perf_counter()
    _check_widths(decoder.ffns, spec)
    run = _Run(decoder, spec, progress)
    with torch.no_grad(), _restored_on_error(decoder.ffns):
        run.count_uses(windows)
        run.prune(windows)
    reports = tuple(run.reports[index] for index in run.order)
    return PruneReport(spec, reports, run.kept, int(windows.numel()), time.perf_counter() - start)


def _check_widths(ffns: Sequence[EagerFFN], spec: PruneSpec) -> None:
    if spec.group is None:
        return
    m = spec.group[1]
    for ffn in ffns:
        for what, width in (("hidden_size", ffn.hidden_size), ("intermediate_size", ffn.intermediate_size)):
            if width % m:
                raise UsageError(f"{ffn.name}: its {what} {width} is not divisible by {m}, so {spec.pattern} does not fit it")


@contextmanager
def _restored_on_error(ffns: Sequence[EagerFFN]) -> Iterator[None]:
    before = Snapshot(ffns)
    try:
        yield
    except BaseException:
        before.restore()
        raise


class _AllPrunedError(Exception):
    """Ends the forward pass after the last FFN: logits of all windows would only cost memory."""


@dataclass
class _Shared:
    """FFNs with the same weights: how often they run in a pass, and the rows of the uses so far."""

    members: list[int]
    uses: int = 0
    rows: list[tuple[EagerFFN, Tensor, Tensor]] = field(default_factory=list)


class _Run:
    """The state of one call of `prune`."""

    def __init__(self, decoder: Decoder, spec: PruneSpec, progress: Callable[[int, int], None]) -> None:
        self._decoder, self._ffns, self._spec, self._progress = decoder, decoder.ffns, spec, progress
        self._groups = _shared_weights(self._ffns)
        self._done = 0
        self.order: list[int] = []
        self.reports: dict[int, LayerReport] = {}
        self.kept: dict[str, np.ndarray] = {}

    def count_uses(self, windows: Tensor) -> None:
        """Run a few tokens to see in which order the FFNs run, and how often each."""

        def inner(index: int, x: Tensor, h: Tensor) -> None:
            self._groups[index].uses += 1
            if index not in self.order:
                self.order.append(index)

        with self._decoder.tap(inner=inner):
            self._decoder.run(windows[:1, :_TRIAL_TOKENS])
        idle = [ffn.name for index, ffn in enumerate(self._ffns) if index not in self.order]
        if idle:
            raise UsageError(f"{', '.join(idle[:4])}: did not run on the calibration text, so it can't be pruned")

    def prune(self, windows: Tensor) -> None:
        """Run all windows, and prune on the way."""
        try:
            with self._decoder.tap(inner=self._reached):
                self._decoder.run(windows)
        except _AllPrunedError:
            return
        missing = self._ffns[next(index for index in self.order if index not in self.reports)].name
        raise UnsupportedModelError(f"{missing}: runs more often on some texts than on others, so it can't be pruned")

    def _reached(self, index: int, x: Tensor, h: Tensor) -> Tensor | None:
        ffn, group = self._ffns[index], self._groups[index]
        x, flat = _flat(x), _flat(h)
        require_finite(x, ffn.name)
        require_finite(flat, ffn.name)
        group.rows.append((ffn, x, flat))
        if len(group.rows) < group.uses:
            return None
        self._prune_group(group)
        self._progress(self._done, len(self._ffns))
        if self._done == len(self._ffns):
            raise _AllPrunedError
        return hidden(ffn, x).view(h.shape)

    def _prune_group(self, group: _Shared) -> None:
        start = time.perf_counter()
        first = self._ffns[group.members[0]]
        parts = projections(first)
        before = [part.weight.float().clone() for part in parts]
        x = torch.cat([x for _, x, _ in group.rows]) if group.uses > 1 else group.rows[0][1]
        h = torch.cat([h for _, _, h in group.rows]) if group.uses > 1 else group.rows[0][2]
        y = h @ before[-1].t()
        if self._spec.pattern == NEURONS:
            kept = self._remove_neurons(group, parts, before, x, h)
            self.kept.update({self._ffns[index].name: kept for index in group.members})
        else:
            self._prune_weights(first, parts, before[:-1], x)
        pruned = torch.cat([hidden(ffn, x) for ffn, x, _ in group.rows])
        group.rows.clear()
        require_finite(pruned, first.name)
        if self._spec.pattern != NEURONS:
            parts[-1].write(_PRUNERS[self._spec.method](pruned, self._spec, first.name)(before[-1]))
        seen = [*(x for _ in parts[:-1]), h if self._spec.pattern == NEURONS else pruned]
        reports = tuple(
            ProjectionReport(part.name, float((part.weight == 0).float().mean()), product_error(rows, old, part.weight.float()))
            for part, rows, old in zip(parts, seen, before, strict=True)
        )
        error = relative_error(y, pruned @ parts[-1].weight.float().t())
        seconds = time.perf_counter() - start
        for index in group.members:
            self.reports[index] = LayerReport(self._ffns[index].name, reports, error, seconds)
        self._done += len(group.members)

    def _prune_weights(self, ffn: EagerFFN, parts: Sequence[FFNProjection], before: Sequence[Tensor], x: Tensor) -> None:
        pruner = _PRUNERS[self._spec.method](x, self._spec, ffn.name)
        for part, weight in zip(parts[:-1], before, strict=True):
            part.write(pruner(weight))

    def _remove_neurons(
        self, group: _Shared, parts: Sequence[FFNProjection], before: Sequence[Tensor], x: Tensor, h: Tensor
    ) -> np.ndarray:
        ffn = self._ffns[group.members[0]]
        count = self._spec.removed(ffn.intermediate_size)
        remove = _NEURON_REMOVERS[self._spec.method]
        removed, down = remove(before[:-1], before[-1], x, h, count, ffn.name)
        parts[-1].write(down)
        for part in parts[:-1]:
            part.weight[removed] = 0.0
        # Shared weights may come with biases of their own.
        for index in group.members:
            for part in projections(self._ffns[index])[:-1]:
                if part.bias is not None:
                    part.bias[removed] = 0.0
        return (~removed).nonzero().flatten().cpu().numpy().astype(np.int64)


def _flat(rows: Tensor) -> Tensor:
    return rows.reshape(-1, rows.shape[-1]).float()


def _shared_weights(ffns: Sequence[EagerFFN]) -> list[_Shared]:
    """For each FFN the group that it belongs to: one object for all FFNs with the same weights."""
    groups: dict[tuple[int, ...], _Shared] = {}
    owners: dict[int, int] = {}
    result = []
    for index, ffn in enumerate(ffns):
        key = tuple(id(module.weight) for module in (*ffn.inputs, ffn.down))
        for part in key:
            other = owners.setdefault(part, index)
            if key not in groups and other != index:
                raise UnsupportedModelError(
                    f"{ffns[other].name} and {ffn.name} share some of their weights and not others: they can't be pruned"
                )
        group = groups.setdefault(key, _Shared([]))
        group.members.append(index)
        result.append(group)
    return result
