"""Train routers and the model's FFN weights together, through the whole model: LTE (arXiv 2402.06126) without a frozen model.

LTE trains all weights on a language-model loss, with soft gates first and hard ones after. Here (own derivation, made for a few
thousand tokens and minutes on a CPU): the weights move by low-rank adapters (LoRA, arXiv 2106.09685); the task is KL(dense ||
sparse) against the model as it was, for which every token has a whole distribution and not one word to learn by heart; and
gates are hard from the beginning, with the gradient of the soft ones (straight-through), so that what is trained is what runs.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from clada_export.calibration.teacher import hold
from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UsageError
from clada_export.methods.lte.train import SEPARABILITY_FLOOR, THRESHOLD
from clada_export.methods.training.train import input_size
from clada_export.plan.adapters import adapted_weights
from graph_passes.router import Router

RANK = 8
"""Of the adapters, where the user does not say."""
CLIP = 1.0
"""The largest norm of a gradient."""


@dataclass(frozen=True)
class FinetuneSettings:
    """How the training goes.

    Attributes:
        learning_rate: of Adam, for adapters; routers learn at `router_rate`.
        efficiency: l1 of LTE, on mean(G^2) over experts and layers.
        separability: l2 of LTE, on mean(1 / ((G - 0.5)^2 + 0.05)).
        patience: epochs without a better KL on the window that is kept back.
    """

    rank: int = RANK
    epochs: int = 12
    learning_rate: float = 1e-3
    router_rate: float = 1e-3
    efficiency: float = 0.1
    separability: float = 1e-3
    patience: int = 3
    seed: int = 0


@dataclass(frozen=True)
class RoutedFFN:
    """An FFN with its frozen-model router.

    Attributes:
        neurons: the order of its neurons in which experts are consecutive, int64 [f]; None for the model's own.
        granule: neurons of an expert.
    """

    ffn: EagerFFN
    router: Router
    neurons: np.ndarray | None
    granule: int


@dataclass(frozen=True)
class Finetuned:
    """What training leaves: a router and the adapters of every FFN, and a report.

    `kl_before` and `kl_after` are mean KL(dense || sparse), nats a token, on the window that was kept back; training stops by
    the same window, so the second is a little optimistic.
    """

    routers: tuple[Router, ...]
    adapters: tuple[tuple[tuple[np.ndarray, np.ndarray], ...], ...]
    epochs: int
    seconds: float
    losses: tuple[float, ...]
    kl_before: float
    kl_after: float


def finetune(
    decoder: Decoder,
    layers: Sequence[RoutedFFN],
    windows: Tensor,
    prompt: int,
    sparsity: float,
    settings: FinetuneSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Finetuned:
    """Train adapters and routers; the decoder is left as it was.

    loss = mean KL(dense || sparse) + efficiency * mean(G^2) + separability * mean(1 / ((G - 0.5)^2 + 0.05))

    After every epoch one number is added to the biases of each layer, so that the wanted share of its experts is shut on the
    training windows again. The last window is kept back; the epoch with its lowest KL is taken, also that before training.

    Args:
        windows: int64 [N, context], N at least 2; the first `prompt` tokens of each run dense.
        sparsity: share of experts to shut in every layer, above 0 and below 1.
        progress: called with (epochs done, epochs at most).

    Raises:
        UsageError: a single window, or a loss that is no longer finite.
    """
    if len(windows) < 2:
        raise UsageError("--finetune needs at least two calibration windows: one to train on, and one to tell when to stop")
    start = time.perf_counter()
    torch.manual_seed(settings.seed)
    dense, sizes = _dense_side(decoder, layers, windows, prompt)
    gates = nn.ModuleList(_Gates(layer, size) for layer, size in zip(layers, sizes, strict=True))
    losses: list[float] = []
    with decoder.frozen(), _adapted(layers, settings.rank) as adapters:
        run = _Run(decoder, layers, gates, windows, dense, prompt)
        optimizer = torch.optim.Adam(
            [
                {"params": list(adapters.parameters()), "lr": settings.learning_rate},
                {"params": list(gates.parameters()), "lr": settings.router_rate},
            ]
        )
        trained = nn.ModuleList((adapters, gates))
        before = best = run.heldout()
        kept, since = copy.deepcopy(trained.state_dict()), 0
        for epoch in range(settings.epochs):
            losses.append(run.epoch(optimizer, settings))
            run.settle(sparsity)
            found = run.heldout()
            progress(epoch + 1, settings.epochs)
            if found < best:
                best, kept, since = found, copy.deepcopy(trained.state_dict()), 0
            else:
                since += 1
            if since >= settings.patience:
                break
        trained.load_state_dict(kept)
        pairs = iter([adapter.arrays() for adapter in adapters if isinstance(adapter, _LowRank)])
        found_adapters = tuple(tuple(next(pairs) for _ in adapted_weights(layer.ffn)) for layer in layers)
    routers = tuple(gate.router() for gate in gates if isinstance(gate, _Gates))
    return Finetuned(routers, found_adapters, len(losses), time.perf_counter() - start, tuple(losses), before, best)


class _LowRank(nn.Module):
    """weight + left @ right; begins as the weight."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.right = nn.Parameter(torch.randn(rank, weight.shape[1]) / math.sqrt(weight.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.left @ self.right

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self.left.detach().numpy().copy(), self.right.detach().numpy().copy()


class _Gates(nn.Module):
    """A layer's sigmoid router, on inputs of the size that training's rates are made for, as in `train.input_size`."""

    def __init__(self, layer: RoutedFFN, size: float) -> None:
        super().__init__()
        (weight,), (bias,) = layer.router.weights, layer.router.biases
        assert bias is not None
        self._layer, self._size = layer, size
        self.weight = nn.Parameter(torch.from_numpy(weight) * size)
        self.bias = nn.Parameter(torch.from_numpy(bias).clone())
        # Where each of the model's neurons is among the experts.
        places = np.arange(layer.ffn.intermediate_size) if layer.neurons is None else np.argsort(layer.neurons)
        self._expert = torch.from_numpy(places // layer.granule)

    def logits(self, x: Tensor) -> Tensor:
        return functional.linear(x / self._size, self.weight, self.bias)

    def mask(self, gate: Tensor) -> Tensor:
        """[rows, f] of ones and zeros, with the gradient of the gate itself."""
        hard = (gate > THRESHOLD).float() + gate - gate.detach()
        return hard[:, self._expert]

    def router(self) -> Router:
        weight = (self.weight.detach() / self._size).numpy()
        old = self._layer.router
        return Router((weight,), (self.bias.detach().numpy().copy(),), old.hidden, old.output, old.normalise, old.scale, old.k)


class _Run:
    """The model on windows, its FFNs gated after the prompt."""

    def __init__(
        self,
        decoder: Decoder,
        layers: Sequence[RoutedFFN],
        gates: nn.ModuleList,
        windows: Tensor,
        dense: Sequence[Tensor],
        prompt: int,
    ) -> None:
        self._decoder, self._ffns, self._gates = decoder, [layer.ffn for layer in layers], gates
        self._windows, self._dense, self._prompt = windows, dense, prompt

    def epoch(self, optimizer: torch.optim.Optimizer, settings: FinetuneSettings) -> float:
        """One step for every training window; the mean loss."""
        total = 0.0
        parameters = [item for group in optimizer.param_groups for item in group["params"]]
        for index in range(len(self._windows) - 1):
            seen: list[Tensor] = []
            loss = self._kl(index, seen)
            gate = torch.stack([torch.sigmoid(logits).square().mean() for logits in seen]).mean()
            push = torch.stack([_push(torch.sigmoid(logits)) for logits in seen]).mean()
            loss = loss + settings.efficiency * gate + settings.separability * push
            if not bool(loss.isfinite()):
                raise UsageError(
                    f"--finetune: the loss of calibration window {index} is {float(loss.detach())}; the model is broken"
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            total += float(loss.detach())
        return total / (len(self._windows) - 1)

    def settle(self, sparsity: float) -> None:
        """Shift every layer's biases so that a share `sparsity` of its gates is shut on the training windows."""
        seen: list[list[Tensor]] = []
        with torch.no_grad():
            for index in range(len(self._windows) - 1):
                seen.append([])
                self._kl(index, seen[-1])
            for gate, parts in zip(self._gates, zip(*seen, strict=True), strict=True):
                assert isinstance(gate, _Gates)
                logits = torch.cat(parts).flatten()
                shut = max(1, min(round(sparsity * len(logits)), len(logits)))
                gate.bias.sub_(logits.kthvalue(shut).values)

    def heldout(self) -> float:
        """Mean KL on the last window."""
        with torch.no_grad():
            return float(self._kl(len(self._windows) - 1, []))

    def _kl(self, index: int, seen: list[Tensor]) -> Tensor:
        """Mean KL(dense || sparse) of the window's tokens after the prompt; `seen` takes every layer's logits of gates."""
        prompt, window = self._prompt, self._windows[index]

        def inner(layer: int, x: Tensor, h: Tensor) -> Tensor:
            rows = h.reshape(-1, h.shape[-1])
            gates = self._gates[layer]
            assert isinstance(gates, _Gates)
            logits = gates.logits(x.reshape(-1, x.shape[-1])[prompt:])
            seen.append(logits)
            masked = rows[prompt:] * gates.mask(torch.sigmoid(logits))
            return torch.cat((rows[:prompt], masked)).reshape(h.shape)

        with self._decoder.tap(inner=inner, only=self._ffns):
            logits = self._decoder.logits(window)[prompt:].float()
        sparse, dense = logits.log_softmax(-1), self._dense[index].log_softmax(-1)
        kl: Tensor = (dense.exp() * (dense - sparse)).sum(-1).mean()
        return kl


def _push(gate: Tensor) -> Tensor:
    return (1.0 / ((gate - THRESHOLD).square() + SEPARABILITY_FLOOR)).mean()


def _dense_side(
    decoder: Decoder, layers: Sequence[RoutedFFN], windows: Tensor, prompt: int
) -> tuple[list[Tensor], list[float]]:
    """The dense logits after the prompt of every window, and the size of every layer's inputs."""
    kept: list[Tensor] = []
    sizes: dict[int, float] = {}

    def inner(layer: int, x: Tensor, h: Tensor) -> None:
        sizes.setdefault(layer, input_size(x.reshape(-1, x.shape[-1])))

    with torch.no_grad(), decoder.tap(inner=inner, only=[layer.ffn for layer in layers]):
        for window in windows:
            logits = decoder.logits(window)[prompt:].float()
            kept.append(hold(logits, logits.nbytes * len(windows)))
    return kept, [sizes[index] for index in range(len(layers))]


@contextmanager
def _adapted(layers: Sequence[RoutedFFN], rank: int) -> Iterator[nn.ModuleList]:
    """The FFNs' weights with adapters in front of them; afterwards as they were."""
    adapters = nn.ModuleList()
    with ExitStack() as stack:
        for layer in layers:
            for item in adapted_weights(layer.ffn):
                adapter = _LowRank(item.weight, rank)
                stack.callback(_unwrap, item.module, list(item.module._parameters))
                parametrize.register_parametrization(item.module, "weight", adapter)
                adapters.append(adapter)
        yield adapters


def _unwrap(module: nn.Module, order: list[str]) -> None:
    """The module without its adapter, its parameters in their old order: exporters write them in it."""
    if parametrize.is_parametrized(module, "weight"):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    found = {name: module._parameters.pop(name) for name in order}
    module._parameters.update(found)
