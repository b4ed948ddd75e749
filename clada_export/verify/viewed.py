"""The eager side of verification for quantised weights: the decoder computed with them, neurons skipped by the op's rule.

What rounds the inputs of a product to 8 bits makes a step of a difference in the last bit, now and then. So an engine and eager
PyTorch, whose sums have other orders, part by such steps, and each step by others after it. How far is measured: the same view
is run once more with inputs moved by what another order moves them (`clada_export.quantise.view.NUDGE`). Two such runs are as
far apart as the engine may be from either, whatever the model is (`clada_export.verify.precision.FACTOR` times that, as for
types of 16 bits).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.op.reference import SparseFFNTensors, load_multiplier, select_granules
from clada_export.plan.plan import SparsityPlan
from clada_export.quantise.view import QuantisedView
from clada_export.verify.derivation import derive_tensors
from clada_export.verify.eager import Seen, SparseRun, dense_rows
from clada_export.verify.precision import RoundedRun
from graph_passes.op import SparseFFNAttributes

Float32 = npt.NDArray[np.float32]
Keep = Callable[[Float32], Float32]


class ViewedModel:
    """The decoder under a view.

    Args:
        view: computes it.
        nudge: seed of what moves inputs; None moves nothing.
    """

    def __init__(self, decoder: Decoder, plan: SparsityPlan, view: QuantisedView, nudge: int | None = None) -> None:
        self._decoder, self._plan, self._view, self._nudge = decoder, plan, view, nudge
        self._chosen = [(ffn, layer) for ffn in decoder.ffns if (layer := plan.layer(ffn.name)) is not None]

    def dense(self, rows: Sequence[Sequence[int]], take: Callable[[int, Float32], Float32]) -> list[Float32]:
        """As `clada_export.verify.eager.dense_rows`."""
        with self._on():
            return dense_rows(self._decoder, rows, take)

    def sparse(
        self,
        rows: Sequence[Sequence[int]],
        loads: Sequence[Float32],
        last: int,
        keep: Keep,
        seen: Seen = lambda name, tensors: None,
    ) -> list[SparseRun]:
        """As `clada_export.verify.eager.ReferenceModel.run_all`."""
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        load = torch.full((len(rows), longest), -torch.inf)
        for row, values in enumerate(loads):
            load[row, : len(values)] = torch.from_numpy(np.asarray(values, dtype=np.float32))
        active: list[npt.NDArray[np.int32]] = []

        def inner(index: int, x: Tensor, h: Tensor) -> Tensor:
            ffn, layer = self._chosen[index]
            attributes = replace(self._plan.attributes(layer), has_bias=ffn.has_bias)
            tensors = derive_tensors(ffn, self._plan.score, layer.threshold, None)
            seen(ffn.name, tensors)
            mask = active_neurons(h.reshape(len(rows), longest, -1), load, tensors, attributes)
            active.append(mask.sum(-1).numpy().astype(np.int32))
            return torch.where(mask.reshape(h.shape), h, torch.zeros(()))

        ids = torch.tensor([[*row, *(row[-1:] * (longest - len(row)))] for row in map(list, rows)])
        ffns = [ffn for ffn, _ in self._chosen]
        with torch.inference_mode(), self._on(), self._decoder.tap(inner=inner, only=ffns):
            logits = self._decoder.run(ids, positions=self._decoder.counted(longest)).logits
        counts = np.stack(active, axis=1) if active else np.zeros((len(rows), 0, longest), np.int32)
        return [
            SparseRun(keep(logits[row, max(0, length - last) : length].float().numpy()), counts[row, :, :length], ())
            for row, length in enumerate(lengths)
        ]

    def both(self, rows: Sequence[Sequence[int]], loads: Sequence[Float32], last: int, keep: Keep) -> list[RoundedRun]:
        """Dense and sparse runs, as `clada_export.verify.precision.RoundedModel.run_all`."""
        dense = self.dense(rows, lambda index, logits: keep(logits))
        return [RoundedRun(*runs) for runs in zip(dense, self.sparse(rows, loads, last, keep), strict=True)]

    def _on(self) -> AbstractContextManager[None]:
        return self._view.on(None if self._nudge is None else torch.Generator().manual_seed(self._nudge))


def active_neurons(h: Tensor, load: Tensor, tensors: SparseFFNTensors, attributes: SparseFFNAttributes) -> Tensor:
    """Which neurons run, bool as h, by score `exact` (docs/sparse-ffn-op.md).

    Args:
        h: float32 [.., f].
        load: float32 [..].
    """
    assert tensors.neuron_scale is not None
    score = h.abs() * tensors.neuron_scale
    active = select_granules(score, tensors.threshold, load_multiplier(load, attributes), attributes, None)
    dense = load.isnan() | (load == torch.inf)
    mask: Tensor = (active | dense.unsqueeze(-1)) & (load != -torch.inf).unsqueeze(-1)
    return mask
