"""A decoder with simulated FFNs: many cells side by side in one pass, so that each layer is quantised once for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.frontier.ffn import Exact, Format, Kitchen, Quantised
from benchmarks.frontier.tables import Choice
from benchmarks.frontier.turn import Turn
from clada_export.decoder.ffn import EagerFFN
from clada_export.decoder.ffn.projections import projections
from clada_export.errors import UnsupportedModelError


@contextmanager
def precise() -> Iterator[None]:
    """Products of matrices in float32, whatever they are in outside."""
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


ROWS = 128
"""Tokens whose logits are in memory at a time."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Plan:
    """What the FFNs of one cell do: the formats, and for every layer a choice among them. None: as they are."""

    forms: tuple[Format, ...]
    layers: tuple[Choice, ...]


@dataclass(frozen=True)
class Read:
    """What a cell read after the prompts: bits a weight of the FFNs, shares of neurons with all planes and with high planes."""

    bits: float
    whole: float
    medium: float


class Simulation:
    """A model of transformers with gated FFNs.

    Args:
        turn: to the basis in which weights are quantised; None: their own. The weights of the FFNs are
            turned in place, so the model must not be run otherwise any more.

    Raises:
        UnsupportedModelError: an FFN without a gate, or with biases.
    """

    def __init__(self, model: PreTrainedModel, ffns: Sequence[EagerFFN], turn: Turn | None) -> None:
        self.model, self.ffns, self.turn = model, ffns, turn
        self._blocks = [model.get_submodule(ffn.name.rpartition(".")[0]) for ffn in ffns]
        for ffn in ffns:
            if not ffn.gated or ffn.has_bias:
                raise UnsupportedModelError(f"{ffn.name}: the simulation knows gated FFNs without biases")
            if turn is not None:
                with torch.no_grad(), precise():
                    *inputs, down = (part.weight for part in projections(ffn))
                    for weight in inputs:
                        weight.copy_(turn(weight))
                    down.copy_(turn(down.t()).t())

    def exact(self, index: int) -> Exact:
        """The weights of an FFN in the basis of quantisation."""
        return Exact.of(self.ffns[index])

    def _run_exact(self, index: int, x: Tensor) -> Tensor:
        exact = self.exact(index)
        y = exact.hidden(self.turned(x)) @ exact.down
        return y if self.turn is None else self.turn.back(y)

    def turned(self, x: Tensor) -> Tensor:
        """Rows [.., d] in that basis."""
        return x if self.turn is None else self.turn(x)

    @torch.inference_mode()
    def inputs(self, windows: Tensor) -> list[Tensor]:
        """For every FFN its inputs on some windows [N, context], in the basis of quantisation: [N * context, d]."""
        found: dict[int, Tensor] = {}

        def keep(index: int) -> Callable[[nn.Module, Any], None]:
            def hook(module: nn.Module, given: Any) -> None:
                found[index] = self.turned(given[0].reshape(-1, given[0].shape[-1]))

            return hook

        handles = [block.register_forward_pre_hook(keep(index)) for index, block in enumerate(self._blocks)]
        try:
            with self._replaced(self._run_exact):
                self._states(windows)
        finally:
            for handle in handles:
                handle.remove()
        return [found[index] for index in range(len(self.ffns))]

    @torch.inference_mode()
    def states(self, windows: Tensor, prompt: int, plans: Sequence[Plan | None], kitchen: Kitchen) -> tuple[Tensor, list[Read]]:
        """Last hidden states [plans, N, context, d] of the cells, and what each read (None reads 32 bits)."""
        cells = len(plans)
        sums = np.zeros((cells, 3))
        dense = (torch.arange(windows.shape[1]) < prompt).repeat(len(windows))

        def run(index: int, x: Tensor) -> Tensor:
            exact = self.exact(index)
            rows = self.turned(x).reshape(cells, -1, x.shape[-1])
            y = torch.empty_like(rows)
            for form, members in _by_format(plans, index):
                made = None if form is None else kitchen.quantised(index, exact, form)
                for cell in members:
                    if made is None:
                        y[cell] = exact.hidden(rows[cell]) @ exact.down
                        continue
                    plan = plans[cell]
                    assert plan is not None
                    y[cell], found = _cell(made, rows[cell], plan.layers[index], dense)
                    sums[cell] += found
            return (y if self.turn is None else self.turn.back(y)).view_as(x)

        with self._replaced(run):
            states = self._states(windows.repeat(cells, 1))
        means = sums / len(self.ffns)
        reads = [Read(*means[cell]) if plan is not None else Read(32.0, 1.0, 0.0) for cell, plan in enumerate(plans)]
        return states.view(cells, *windows.shape, -1), reads

    def _states(self, windows: Tensor) -> Tensor:
        model: Any = self.model
        states: Tensor = model.get_decoder()(input_ids=windows, use_cache=False).last_hidden_state
        return states

    @contextmanager
    def _replaced(self, run: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        before = [block.forward for block in self._blocks]
        for index, block in enumerate(self._blocks):
            block.forward = lambda x, index=index: run(index, x)
        try:
            yield
        finally:
            for block, forward in zip(self._blocks, before, strict=True):
                block.forward = forward

    @property
    def head(self) -> nn.Linear:
        """The LM head."""
        model: Any = self.model
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UnsupportedModelError(f"{type(self.model).__name__}: no linear LM head")
        return head

    def attention(self) -> list[tuple[str, nn.Linear]]:
        """The projections of attention."""
        found = [(name, module) for name, module in self.model.named_modules() if name.endswith(ATTENTION)]
        return [(name, module) for name, module in found if isinstance(module, nn.Linear)]

    @torch.no_grad()
    def quantised_linear(self, name: str, weight: Tensor, form: Callable[[Tensor], Tensor]) -> Tensor:
        """A projection's weight [out, in] in a format, back in the model's basis.

        Args:
            name: ends in `o_proj` for what writes the residual; all others read it.
        """
        if self.turn is None:
            return form(weight)
        with precise():
            if name.endswith("o_proj"):
                return self.turn.back(form(self.turn(weight.t()).t().contiguous()).t()).t().contiguous()
            return self.turn.back(form(self.turn(weight)))

    @contextmanager
    def attention_in(self, form: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
        """The model with attention's projections in a format."""
        if form is None:
            yield
            return
        before = [(module, module.weight) for _, module in self.attention()]
        try:
            for name, module in self.attention():
                made = self.quantised_linear(name, module.weight.detach(), form)
                module.weight = nn.Parameter(made, requires_grad=False)
            yield
        finally:
            for module, weight in before:
                module.weight = weight


def _by_format(plans: Sequence[Plan | None], index: int) -> list[tuple[Format | None, list[int]]]:
    """The cells of each format that this layer has in any of them."""
    groups: dict[Format | None, list[int]] = {}
    for cell, plan in enumerate(plans):
        form = None if plan is None else plan.forms[plan.layers[index].form]
        groups.setdefault(form, []).append(cell)
    return list(groups.items())


def _cell(made: Quantised, x: Tensor, choice: Choice, dense: Tensor) -> tuple[Tensor, np.ndarray]:
    """y, and (bits, whole, medium) of the rows that are not dense."""
    result = made.output(*made.score(x), choice.drop, choice.refine, dense)
    whole, medium = (float(part[~dense].mean()) for part in (result.whole, result.medium))
    return result.y, np.array([made.bits(whole, medium), whole, medium])


class Yardstick:
    """The exact model's predictions on the held-out windows, and how far others are from them.

    Args:
        states: last hidden states [N, context, d].
        windows: int64 [N, context].
        prompt: tokens of a window that are not scored.
    """

    @torch.inference_mode()
    def __init__(self, head: nn.Linear, states: Tensor, windows: Tensor, prompt: int) -> None:
        self._head, self._windows, self._prompt = head, windows, prompt
        rows = self._rows(states)
        self._targets = windows[:, prompt + 1 :].reshape(-1)
        self._log_p = [nn.functional.linear(part, head.weight).log_softmax(-1) for part in torch.split(rows, ROWS)]

    def _rows(self, states: Tensor) -> Tensor:
        return states[:, self._prompt : -1].reshape(-1, states.shape[-1])

    @torch.inference_mode()
    def compare(self, states: Tensor, head: Tensor | None = None) -> Mapping[str, float]:
        """Of a cell's states [N, context, d]: mean KL(exact || cell), perplexities, top-1 agreement; errors are standard errors
        over tokens.

        Args:
            head: another weight of the LM head [vocabulary, d].
        """
        weight = self._head.weight if head is None else head
        kl, top, ours, theirs = [], [], [], []
        parts = zip(torch.split(self._rows(states), ROWS), torch.split(self._targets, ROWS), self._log_p, strict=True)
        for rows, targets, log_p in parts:
            log_q = nn.functional.linear(rows, weight).log_softmax(-1)
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))
            top.append((log_p.argmax(-1) == log_q.argmax(-1)).double())
            ours.append(-log_q.gather(-1, targets[:, None])[:, 0])
            theirs.append(-log_p.gather(-1, targets[:, None])[:, 0])
        divergence, same, nll, dense = (torch.cat(part).double() for part in (kl, top, ours, theirs))
        count = len(nll)
        return {
            "tokens": count,
            "kl": float(divergence.mean()),
            "kl_error": float(divergence.std()) / math.sqrt(count),
            "ppl": math.exp(float(nll.mean())),
            "dense_ppl": math.exp(float(dense.mean())),
            "ppl_increase": math.expm1(float((nll - dense).mean())),
            "ppl_increase_error": float((nll - dense).std()) / math.sqrt(count),
            "top1": float(same.mean()),
        }
