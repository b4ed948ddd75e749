"""Run documents with masks in eager PyTorch, token by token decisions in one pass, dense steps and refreshes included."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clada_export.calibration.selector import LayerSelector
from clada_export.decoder.decoder import Decoder
from clada_export.load.surprisal import surprisal_entropy


@dataclass(frozen=True)
class Run:
    """What is simulated on all documents.

    Attributes:
        layers: one selector an FFN.
        levels: [layers].
        multiplier: m(load), float32 [documents, context - prompt]; 0 is a dense step.
        exponents: [layers]: a layer's multiplier is m to this power; None is 1.
        refresh: whether dense steps enter the prompt statistic (of methods that have one).
    """

    layers: Sequence[LayerSelector]
    levels: np.ndarray
    multiplier: Tensor
    exponents: np.ndarray | None = None
    refresh: bool = True


@dataclass(frozen=True)
class DocumentDrift:
    """By document: mean KL(dense || sparse) and mean rise of the negative log likelihood, nats a token, share of tokens with
    the same best guess, share of skipped neurons; all [documents]."""

    kl: np.ndarray
    nll_increase: np.ndarray
    top1: np.ndarray
    sparsity: np.ndarray


def document_signals(
    decoder: Decoder, documents: Tensor, step: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, np.ndarray]:
    """Surprisal and entropy of every token but the first, by the dense model: nats, each [documents, context - 1]."""
    found = []
    with torch.inference_mode():
        for document in documents:
            found.append(torch.stack(surprisal_entropy(_logits(decoder, document)[:-1], document[1:])))
            step()
    surprisal, entropy = torch.stack(found, dim=1).double().numpy()
    return surprisal, entropy


def simulate(
    decoder: Decoder,
    documents: Tensor,
    prompt: int,
    runs: Sequence[Run],
    step: Callable[[], None] = lambda: None,
) -> list[DocumentDrift]:
    """Run every document dense once, and once for each of `runs`: its first `prompt` tokens dense, the others as the run says.

    The text is given, so every run sees the same tokens. Scored are the predictions of the tokens after the prompt.

    Args:
        documents: int64 [N, context].
        step: called after every run of a document.
    """
    numbers = np.zeros((len(runs), 4, len(documents)))
    with torch.inference_mode():
        for place, document in enumerate(documents):
            start = _Prompt.run(decoder, document, prompt)
            rest, targets = document[prompt:], document[prompt + 1 :].unsqueeze(-1)
            dense = start.go_on(decoder, rest)
            for index, run in enumerate(runs):
                pass_ = _SparsePass(run, place, start)
                with decoder.tap(inner=pass_.inner):
                    sparse = start.go_on(decoder, rest)
                kl = (dense.exp() * (dense - sparse)).sum(-1).clamp(min=0.0)
                rise = (dense - sparse).gather(-1, targets)
                same = (dense.argmax(-1) == sparse.argmax(-1)).float()
                numbers[index, :, place] = [float(kl.mean()), float(rise.mean()), float(same.mean()), pass_.sparsity]
                step()
    return [DocumentDrift(*rows) for rows in numbers]


@dataclass(frozen=True)
class _Prompt:
    """What a document's dense prompt leaves behind: its cache, and the hidden activations [prompt, f] of every FFN."""

    cache: Any
    hidden: dict[int, Tensor]

    @classmethod
    def run(cls, decoder: Decoder, document: Tensor, prompt: int) -> _Prompt:
        hidden: dict[int, Tensor] = {}

        def keep(index: int, x: Tensor, h: Tensor) -> None:
            hidden[index] = h.reshape(-1, h.shape[-1]).clone()

        with decoder.tap(inner=keep):
            output = decoder.run(document[None, :prompt], keep_cache=True)
        return cls(output.cache, hidden)

    def go_on(self, decoder: Decoder, rest: Tensor) -> Tensor:
        """log p [rest - 1, V] of all but the last prediction. The cache stays as it was."""
        output = decoder.run(rest[None], cache=copy.deepcopy(self.cache), keep_cache=True)
        return output.logits[0, :-1].float().log_softmax(-1)


class _SparsePass:
    """One run of one document."""

    def __init__(self, run: Run, document: int, start: _Prompt) -> None:
        self._run, self._start = run, start
        self._multiplier = run.multiplier[document]
        self._dense = self._multiplier == 0
        self._active = self._total = 0

    @property
    def sparsity(self) -> float:
        """The share of neurons that was skipped."""
        return 1.0 - self._active / max(self._total, 1)

    def inner(self, index: int, x: Tensor, h: Tensor) -> Tensor:
        run = self._run
        selector = run.layers[index]
        rows = h.reshape(-1, h.shape[-1])
        scores = None if selector.scorer is None else selector.scorer(x.reshape(-1, x.shape[-1]), rows)
        stat = self._stat(selector, self._start.hidden[index], rows) if selector.needs_stat else None
        selection = selector.decide(x.reshape(-1, x.shape[-1]), scores, stat)
        power = 1.0 if run.exponents is None else float(run.exponents[index])
        # A dense row has no level; whatever the rule gives at 1 is replaced below.
        moved = torch.where(self._dense, torch.ones(()), self._multiplier).pow(power)
        level = selector.axis.moved(torch.tensor(float(run.levels[index])), moved.unsqueeze(-1))
        remaining, keep = selector.hidden(rows, selection, level)
        kept = torch.where(self._dense, keep.shape[-1], keep.sum(-1))
        self._active += int(kept.sum()) * selector.layer.granule
        self._total += selector.layer.width * len(rows)
        return torch.where(self._dense.unsqueeze(-1), rows, remaining).reshape(h.shape)

    def _stat(self, selector: LayerSelector, prompt: Tensor, rows: Tensor) -> Tensor:
        """The prompt statistic that each row sees, [rows or 1, f]: the prompt's, and that of dense rows before it."""
        stat = selector.stat(prompt)
        if not (self._run.refresh and bool(self._dense.any())):
            return stat
        shares = torch.zeros(len(rows) + 1, stat.shape[-1])
        shares[0] = stat[0]
        for row in self._dense.nonzero().flatten().tolist():
            shares[row + 1] = selector.stat(rows[row : row + 1])[0]
        return shares.cumsum(0)[:-1]


def _logits(decoder: Decoder, document: Tensor) -> Tensor:
    return decoder.logits(document).float()
