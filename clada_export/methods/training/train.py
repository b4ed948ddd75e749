"""One small training loop for all routers: AdamW on minibatches, a held-out tenth, early stopping, a fixed seed, the CPU."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graph_passes.router import Router

Progress = Callable[[int, int], None]
HELDOUT = 0.1
"""Share of the rows that no gradient sees."""


def no_progress(done: int, total: int) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast.

    Attributes:
        epochs: most passes over the training rows.
        batch: rows a step.
        learning_rate, weight_decay: of AdamW; without decay it is Adam.
        patience: stop after this many epochs without a better held-out metric.
        enough: stop when the held-out metric is above this.
        seed: of the split, the initial weights and the order of the rows.
    """

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.0
    patience: int = 5
    enough: float = math.inf
    seed: int = 0


@dataclass(frozen=True)
class TrainingReport:
    """What a training did.

    Attributes:
        epochs: passes over the training rows.
        seconds: wall-clock time of the training, with the making of its targets.
        losses: mean training loss of every epoch.
        metrics: by name, on the held-out rows. Early stopping looks at the same rows, so the metric it watches is a
            little optimistic.
    """

    epochs: int
    seconds: float
    losses: tuple[float, ...]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Fitted:
    """What `fit` leaves behind besides the trained parameters: epochs and the mean loss of each."""

    epochs: int
    losses: tuple[float, ...]


def split_rows(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """(training, held-out) row numbers, int64, each sorted; a tenth, at least one row, is held out."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    held = max(1, round(rows * HELDOUT))
    return order[held:].sort().values, order[:held].sort().values


def linear_weight(out_features: int, in_features: int, generator: torch.Generator) -> Tensor:
    """Initial weights [out, in] as `nn.Linear` draws them: uniform within 1 / sqrt(in)."""
    bound = 1.0 / math.sqrt(in_features)
    return torch.empty(out_features, in_features).uniform_(-bound, bound, generator=generator)


def input_size(x: Tensor) -> float:
    """What to divide x [N, d] by for training, so that a learning rate means the same in every model (own derivation).

    A step of Adam moves every weight by up to the learning rate, hence an output by up to the rate times sum |x_i|; that sum
    is 60 in SmolLM2 and thousands in wider models. It is made 64 on average. The first layer's weights are divided by the same
    number afterwards, which takes it out of the result.
    """
    return max(float(x.abs().mean()) * x.shape[-1] / 64.0, 1e-30)


def fit(
    parameters: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    metric: Callable[[Tensor], float],
    rows: int,
    settings: TrainingSettings,
    progress: Progress = no_progress,
) -> Fitted:
    """Train `parameters` in place; they end at the values of the epoch with the best held-out metric.

    Args:
        parameters: float32 leaves.
        loss: of the training rows numbered int64 [B].
        metric: of the held-out rows; higher is better.
        rows: N; the split is `split_rows(N, settings.seed)`.
        progress: called with (epochs done, most epochs).
    """
    training, heldout = split_rows(rows, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(list(parameters), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best, best_metric, since = [parameter.detach().clone() for parameter in parameters], -math.inf, 0
    losses: list[float] = []
    for epoch in range(settings.epochs):
        total = 0.0
        for batch in torch.split(training[torch.randperm(len(training), generator=generator)], settings.batch):
            with torch.enable_grad():
                value = loss(batch)
            optimiser.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += float(value.detach()) * len(batch)
        losses.append(total / len(training))
        with torch.no_grad():
            found = metric(heldout)
        progress(epoch + 1, settings.epochs)
        since += 1
        if found > best_metric:
            best, best_metric, since = [parameter.detach().clone() for parameter in parameters], found, 0
        if found > settings.enough or since >= settings.patience:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
            parameter.requires_grad_(False)
    return Fitted(len(losses), tuple(losses))


class RouterTask(ABC):
    """One router on its way: parameters, what they are to make small, and what becomes of them.

    Attributes:
        parameters: float32 leaves, trained in place.
    """

    parameters: tuple[Tensor, ...]

    @abstractmethod
    def loss(self, rows: Tensor) -> Tensor:
        """Of the rows numbered int64 [B]; differentiable."""

    def metric(self, rows: Tensor) -> float:
        """By which early stopping goes, higher is better; the loss, where a task has no better one."""
        return -float(self.loss(rows))

    @abstractmethod
    def metrics(self, heldout: Tensor) -> dict[str, float]:
        """What the report tells of the held-out rows, int64 [B]."""

    @abstractmethod
    def router(self) -> Router:
        """The router that the parameters make."""

    def fit(self, rows: int, settings: TrainingSettings, progress: Progress = no_progress) -> Fitted:
        """See the function `fit`."""
        return fit(self.parameters, self.loss, self.metric, rows, settings, progress)

    def told(self, rows: int, settings: TrainingSettings) -> dict[str, float]:
        """`metrics` of the rows that no gradient saw."""
        _, heldout = split_rows(rows, settings.seed)
        with torch.no_grad():
            return self.metrics(heldout)


def train_router(
    make: Callable[[torch.Generator], RouterTask], rows: int, settings: TrainingSettings, progress: Progress = no_progress
) -> tuple[Router, TrainingReport]:
    """Make a task, train it, and tell of it.

    Args:
        make: draws the initial weights from the generator that it is given, whose seed is `settings.seed`.
        rows: N, of the task.
        progress: called with (epochs done, most epochs).
    """
    watch = Stopwatch()
    task = make(torch.Generator().manual_seed(settings.seed))
    fitted = task.fit(rows, settings, progress)
    metrics = task.told(rows, settings)
    return task.router(), watch.report(fitted, metrics)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def report(self, fitted: Fitted, metrics: dict[str, float]) -> TrainingReport:
        """The report of a training that began when the stopwatch was made."""
        return TrainingReport(fitted.epochs, time.perf_counter() - self._start, fitted.losses, metrics)


def arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    """Trained tensors as float32 arrays of their own."""
    return tuple(tensor.detach().numpy().astype(np.float32).copy() for tensor in tensors)
