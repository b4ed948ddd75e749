"""The eager side of verification: the untouched model, and the same model with reference FFNs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn import EagerFFN
from clada_export.decoder.ffn.layer import weight_rows
from clada_export.op.reference import SparseFFNTensors, dequantize_shadow, neuron_outputs, prompt_shares, sparse_ffn
from clada_export.op.router import RouterModule
from clada_export.plan.layer import LayerPlan
from clada_export.plan.plan import SparsityPlan
from clada_export.verify.derivation import derive_tensors
from clada_export.verify.merging import MergedReference
from graph_passes.op import SparseFFNAttributes

Float32 = npt.NDArray[np.float32]
Kept = TypeVar("Kept")
Seen = Callable[[str, SparseFFNTensors], None]
LOGITS_AT_ONCE = 1 << 26
"""Of a dense run: 256 MB, of which a model may make a copy or two."""


@dataclass(frozen=True)
class SparseRun:
    """Logits [T, V] float32 of one row, or of its last tokens; how many neurons each FFN ran, int32 [runs, T]; and the prompt
    statistic of every one that keeps one, float32 [1, f']. In the order in which they run; one that runs more than once is
    there as often."""

    logits: Float32
    active: npt.NDArray[np.int32]
    stats: tuple[Float32, ...]


@dataclass(frozen=True)
class Best:
    """What the untouched model would say at places of a text: its tokens, and at each the gap between its two best logits."""

    tokens: list[int]
    gaps: list[float]


def dense_rows(
    decoder: Decoder, rows: Sequence[Sequence[int]], take: Callable[[int, Float32], Kept], at_once: int = LOGITS_AT_ONCE
) -> list[Kept]:
    """Run the untouched model on rows, in one piece. Rows of one length are a batch, which needs no padding.

    Args:
        take: called as take(index of the row, its logits [T, V]); what it returns is kept.
        at_once: most logits of a batch; a row alone may have more.
    """
    kept: dict[int, Kept] = {}
    for length in sorted({len(row) for row in rows}):
        alike = [index for index, row in enumerate(rows) if len(row) == length]
        width = max(1, at_once // max(1, length * decoder.vocab_size))
        for part in (alike[start : start + width] for start in range(0, len(alike), width)):
            with torch.inference_mode():
                ids = torch.tensor([list(rows[index]) for index in part])
                logits = decoder.run_whole(ids, positions=decoder.counted(length)).logits
            for place, index in enumerate(part):
                kept[index] = take(index, logits[place].float().numpy())
    return [kept[index] for index in range(len(rows))]


def best_tokens(logits: Float32) -> Best:
    """The best token of each place, of logits [T, V], and how far it is above the next."""
    best = torch.from_numpy(logits).topk(2)
    return Best(best.indices[:, 0].tolist(), (best.values[:, 0] - best.values[:, 1]).tolist())


def greedy(decoder: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations of the untouched model with its own cache.

    Args:
        prompts: of one length, run as one batch.
    """
    tokens = []
    length = len(prompts[0])
    with torch.inference_mode():
        output = decoder.run_whole(
            torch.tensor([list(prompt) for prompt in prompts]), positions=decoder.counted(length), keep_cache=True
        )
        for step in range(new_tokens):
            tokens.append(output.logits[:, -1].float().argmax(-1))
            if step + 1 < new_tokens:
                positions = decoder.counted(1, length + step)
                output = decoder.run_whole(tokens[-1][:, None], positions=positions, cache=output.cache, keep_cache=True)
    found: list[list[int]] = torch.stack(tokens, dim=1).tolist()
    return found


class ReferenceModel:
    """The eager decoder with `clada_export.op.reference.sparse_ffn` in place of every planned FFN.

    What is derived of a layer's weights is made when the layer runs, and let go before the next one does.

    Args:
        rewritten: names of the FFNs that the engine runs as the op; others stay as they are.
    """

    def __init__(self, decoder: Decoder, plan: SparsityPlan, rewritten: Sequence[str] | None = None) -> None:
        self._decoder = decoder
        self._plan = plan
        self._chosen = [
            (ffn, layer)
            for ffn in decoder.ffns
            if (layer := plan.layer(ffn.name)) and (rewritten is None or ffn.name in rewritten)
        ]

    def run(self, row: Sequence[int], load: Float32) -> SparseRun:
        """Run one row alone; `load` float32 [T] is the load of every token."""
        return self.run_all([row], [load])[0]

    def run_all(
        self,
        rows: Sequence[Sequence[int]],
        loads: Sequence[Float32],
        *,
        last: int | None = None,
        keep: Callable[[Float32], Float32] = lambda logits: logits,
        seen: Seen = lambda name, tensors: None,
    ) -> list[SparseRun]:
        """Run rows, each a text of its own, through the model together.

        They are padded on the right: no token of a decoder sees what comes after it.

        Args:
            loads: for each row the load of every token, float32 [T].
            last: of how many tokens at the end of each row logits are wanted; None for all.
            keep: puts a row's logits where they may wait.
            seen: called with an FFN's name and what the op should hold for it (`clada_export.verify.derivation`).
        """
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        given = [torch.from_numpy(np.asarray(load, dtype=np.float32)) for load in loads]
        active: list[list[npt.NDArray[np.int32]]] = [[] for _ in rows]
        stats: list[list[Float32]] = [[] for _ in rows]

        def replace(index: int, x: Tensor) -> Tensor:
            layer = _reference_layer(*self._chosen[index], self._plan)
            seen(self._chosen[index][0].name, layer.tensors)
            padded = x.reshape(len(rows), longest, -1)
            y = torch.zeros_like(padded)
            results = layer.run([padded[row, :length] for row, length in enumerate(lengths)], given)
            for row, (part, count, stat) in enumerate(results):
                y[row, : lengths[row]] = part.to(x.dtype)
                active[row].append(count.numpy().astype(np.int32))
                if stat is not None:
                    stats[row].append(stat.numpy())
            return y.reshape(x.shape)

        ffns = [ffn for ffn, _ in self._chosen]
        # A row's own last token, as the padding token may mean something to a model.
        ids = torch.tensor([[*row, *(row[-1:] * (longest - len(row)))] for row in map(list, rows)])
        with torch.inference_mode(), idle(ffns), self._decoder.tap(replace=replace, only=ffns):
            logits = self._decoder.run(ids, positions=self._decoder.counted(longest)).logits
        runs = []
        for row, length in enumerate(lengths):
            counts = np.stack(active[row]) if active[row] else np.zeros((0, length), np.int32)
            wanted = logits[row, 0 if last is None else max(0, length - last) : length]
            runs.append(SparseRun(keep(wanted.float().numpy()), counts, tuple(stats[row])))
        return runs


@contextmanager
def idle(ffns: Sequence[EagerFFN]) -> Iterator[None]:
    """The projections of FFNs give zeros without a product meanwhile: for whoever puts something in the place of the result."""
    modules = [module for ffn in ffns for module in (*ffn.inputs, ffn.down)]
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        vars(module)["forward"] = _zeros(len(weight_rows(module)))
    try:
        yield
    finally:
        for module, forward in zip(reversed(modules), reversed(before), strict=True):
            # A module of two FFNs is in the list twice; the first entry knows what was there.
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


def _zeros(width: int) -> Callable[..., Tensor]:
    def forward(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return x.new_zeros((*x.shape[:-1], width))

    return forward


@dataclass(frozen=True)
class _ReferenceLayer:
    attributes: SparseFFNAttributes
    tensors: SparseFFNTensors
    shadow: Tensor | None
    router: RouterModule | None
    merging: MergedReference | None

    def run(self, rows: Sequence[Tensor], loads: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """For each row: y [T, d] float32, active [T], the statistic [1, f'] after it, of the tokens [T, d] of one text.

        Token t sees the statistic of the tokens of its text before it.
        """
        # The tensors are float32 whatever the model's type is: only what is between the layers is rounded.
        given = [row.float() for row in rows]
        if self.merging is not None:
            return [(*self._run_merged(x, load, self.merging), None) for x, load in zip(given, loads, strict=True)]
        x, load = torch.cat(given), torch.cat(list(loads))
        lengths = [len(row) for row in given]
        score = past = None
        stats: list[Tensor | None] = [None] * len(rows)
        if self.router is not None:
            score = self.router.under(x, load).unsqueeze(1)
        if self.attributes.use_stat:
            hidden, _ = neuron_outputs(x, self.tensors.w_in, self.tensors, self.attributes)
            prompt = (load == float("inf")).unsqueeze(-1)
            shares = torch.where(prompt, prompt_shares(hidden, self.attributes), torch.zeros(()))
            sums = [part.cumsum(0) for part in torch.split(shares, lengths)]
            past = torch.cat([torch.cat((torch.zeros_like(part[:1]), part[:-1])) for part in sums])
            stats = [part[-1:] for part in sums]
        # Every token is a sequence of its own, so that each has its own statistic.
        result = sparse_ffn(
            x.unsqueeze(1),
            load.unsqueeze(1),
            self.tensors,
            self.attributes,
            score=score,
            past_stat=past,
            shadow_weight=self.shadow,
        )
        parts = torch.split(result.y.squeeze(1), lengths), torch.split(result.active.squeeze(1), lengths)
        return list(zip(*parts, stats, strict=True))

    def _run_merged(self, x: Tensor, load: Tensor, merging: MergedReference) -> tuple[Tensor, Tensor]:
        """(y, active). The dense rows that a text begins with are a segment, as a prompt is, and each later one is a segment of
        its own, as a dense step is; rows between them run what was merged last, or dense if nothing was."""
        prompt = load == float("inf")
        whole = torch.where(load == float("-inf"), load, torch.full_like(load, float("inf")))
        result = sparse_ffn(x, whole, self.tensors, self.attributes)
        y, active = result.y.clone(), result.active.clone()
        merged = None
        start = 0
        while start < len(x):
            end = start + 1
            leading = start == 0 or not bool(prompt[start])
            while end < len(x) and leading and prompt[end] == prompt[start]:
                end += 1
            if prompt[start]:
                merged = merging.merge(x[start:end])
            elif merged is not None:
                runs = start + torch.nonzero(load[start:end].isfinite()).flatten()
                y[runs], active[runs] = merging.run(x[runs], merged), merging.granule
            start = end
        return y, active


def _reference_layer(ffn: EagerFFN, layer: LayerPlan, plan: SparsityPlan) -> _ReferenceLayer:
    attributes = replace(plan.attributes(layer), has_bias=ffn.has_bias)
    arrays = plan.tensors(layer)
    tensors = derive_tensors(ffn, plan.score, layer.threshold, arrays.neurons)
    shadow = None
    if tensors.shadow is not None and tensors.shadow_scale is not None:
        shadow = dequantize_shadow(tensors.shadow, tensors.shadow_scale)
    merging = None
    if layer.merge is not None:
        assert arrays.router is not None
        merging = MergedReference(tensors, attributes, arrays.router)
    router = None if arrays.router is None else RouterModule(arrays.router)
    return _ReferenceLayer(attributes, tensors, shadow, router, merging)
