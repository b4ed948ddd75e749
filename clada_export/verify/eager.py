"""The eager side of verification: the untouched model, and the same model with reference FFNs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn import EagerFFN
from clada_export.op.reference import SparseFFNTensors, dequantize_shadow, neuron_outputs, prompt_shares, sparse_ffn
from clada_export.op.router import RouterModule
from clada_export.plan.layer import LayerPlan
from clada_export.plan.plan import SparsityPlan
from clada_export.verify.derivation import derive_tensors
from clada_export.verify.merging import MergedReference
from graph_passes.op import SparseFFNAttributes


@dataclass(frozen=True)
class SparseRun:
    """Logits [T, V] float32 of one row, how many neurons each FFN ran, int32 [runs, T], and the prompt statistic of every one
    that keeps one, float32 [1, f']. In the order in which they run; one that runs more than once is there as often."""

    logits: npt.NDArray[np.float32]
    active: npt.NDArray[np.int32]
    stats: tuple[npt.NDArray[np.float32], ...]


def greedy(decoder: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy continuations of the untouched model with its own cache.

    Args:
        prompts: of one length, run as one batch.

    Returns:
        For each prompt its new tokens, and each step's gap between the two best logits.
    """
    tokens, gaps = [], []
    length = len(prompts[0])
    with torch.inference_mode():
        output = decoder.run_whole(
            torch.tensor([list(prompt) for prompt in prompts]), positions=decoder.counted(length), keep_cache=True
        )
        for step in range(new_tokens):
            best = output.logits[:, -1].float().topk(2)
            tokens.append(best.indices[:, 0])
            gaps.append(best.values[:, 0] - best.values[:, 1])
            if step + 1 < new_tokens:
                positions = decoder.counted(1, length + step)
                output = decoder.run_whole(tokens[-1][:, None], positions=positions, cache=output.cache, keep_cache=True)
    return torch.stack(tokens, dim=1).tolist(), torch.stack(gaps, dim=1).tolist()


class ReferenceModel:
    """The eager decoder with `clada_export.op.reference.sparse_ffn` in place of every planned FFN.

    Args:
        rewritten: names of the FFNs that the engine runs as the op; others stay as they are.
    """

    def __init__(self, decoder: Decoder, plan: SparsityPlan, rewritten: Sequence[str] | None = None) -> None:
        self._decoder = decoder
        chosen = [
            (ffn, layer)
            for ffn in decoder.ffns
            if (layer := plan.layer(ffn.name)) and (rewritten is None or ffn.name in rewritten)
        ]
        self._ffns = [ffn for ffn, _ in chosen]
        self._layers = [_reference_layer(ffn, layer, plan) for ffn, layer in chosen]

    @property
    def constants(self) -> list[tuple[str, SparseFFNTensors]]:
        """By FFN, what the op's nodes should hold (`clada_export.verify.derivation`)."""
        return [(ffn.name, layer.tensors) for ffn, layer in zip(self._ffns, self._layers, strict=True)]

    def run(self, row: Sequence[int], load: npt.NDArray[np.float32]) -> SparseRun:
        """Run one row alone; `load` float32 [T] is the load of every token."""
        loads = torch.from_numpy(np.asarray(load, dtype=np.float32))
        active: list[npt.NDArray[np.int32]] = []
        stats: list[npt.NDArray[np.float32]] = []

        def replace(index: int, x: Tensor) -> Tensor:
            y, count, stat = self._layers[index].run(x.reshape(len(row), -1), loads)
            active.append(count.numpy().astype(np.int32))
            if stat is not None:
                stats.append(stat.numpy())
            return y.to(x.dtype).reshape(x.shape)

        positions = self._decoder.counted(len(row))
        with torch.inference_mode(), self._decoder.tap(replace=replace, only=self._ffns):
            logits = self._decoder.run(torch.tensor([list(row)]), positions=positions).logits[0].float()
        counts = np.stack(active) if active else np.zeros((0, len(row)), np.int32)
        return SparseRun(logits.numpy(), counts, tuple(stats))


@dataclass(frozen=True)
class _ReferenceLayer:
    attributes: SparseFFNAttributes
    tensors: SparseFFNTensors
    shadow: Tensor | None
    router: RouterModule | None
    merging: MergedReference | None

    def run(self, x: Tensor, load: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(y [T, d] float32, active [T], the statistic [1, f'] after them) of the tokens of one sequence.

        Token t sees the statistic of the rows before it.
        """
        # The tensors are float32 whatever the model's type is: only what is between the layers is rounded.
        x = x.float()
        if self.merging is not None:
            return *self._run_merged(x, load, self.merging), None
        score = past = stat = None
        if self.router is not None:
            score = self.router.under(x, load).unsqueeze(1)
        if self.attributes.use_stat:
            hidden, _ = neuron_outputs(x, self.tensors.w_in, self.tensors, self.attributes)
            prompt = (load == float("inf")).unsqueeze(-1)
            shares = torch.where(prompt, prompt_shares(hidden, self.attributes), torch.zeros(()))
            sums = shares.cumsum(0)
            past, stat = torch.cat((torch.zeros_like(shares[:1]), sums[:-1])), sums[-1:]
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
        return result.y.squeeze(1), result.active.squeeze(1), stat

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
