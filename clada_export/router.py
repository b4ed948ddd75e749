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
        return _FUNCTIONS[self.router.output](self.logits(x)) * self.router.scale
