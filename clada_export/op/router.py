"""Evaluate a router (`graph_passes.router.Router`) in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graph_passes.router import Router

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda value: value,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "abs": torch.abs,
    "softmax": lambda value: value.softmax(-1),
}


def topk_softmax(logits: Tensor, k: int) -> Tensor:
    """A softmax over the k largest of the last axis, 0 elsewhere; ties go to the lowest index. Float32, shaped as `logits`."""
    best, places = logits.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(logits).scatter(-1, places[..., :k], best[..., :k].softmax(-1))


class RouterModule:
    """A router on float32 tensors; call it with x [.., d] for scores [.., E]."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._weights = [torch.from_numpy(weight).float() for weight in router.weights]
        self._biases = [None if bias is None else torch.from_numpy(bias).float() for bias in router.biases]

    def logits(self, x: Tensor) -> Tensor:
        """What the last linear layer gives, float32 [.., E]."""
        value = x.float()
        if self.router.normalise:
            value = torch.nn.functional.normalize(value, dim=-1)
        last = len(self._weights) - 1
        for index, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            value = torch.nn.functional.linear(value, weight, bias)
            if index < last:
                value = _FUNCTIONS[self.router.hidden](value)
        return value

    def __call__(self, x: Tensor) -> Tensor:
        """Scores, float32 [.., E], never negative."""
        logits = self.logits(x)
        if self.router.k is not None:
            return topk_softmax(logits, self.router.k) * self.router.scale
        return _FUNCTIONS[self.router.output](logits) * self.router.scale

    def under(self, x: Tensor, load: Tensor) -> Tensor:
        """The scores that the engine's nodes give under a load, float32 [.., E].

        Args:
            load: float32 [..]; rows at +inf or NaN run dense (`Router.dense_rows`).
        """
        scores = self(x)
        if self.router.dense_rows == "scores":
            return scores
        dense = (load.isnan() | (load == float("inf"))).unsqueeze(-1)
        return torch.where(dense, torch.ones(()), scores)
