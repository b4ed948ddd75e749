"""A language model of a few lines around whatever blocks a test brings."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 50


class Attention(nn.Module):
    """A mean over the tokens so far: q, k, v and o."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, width] to the same."""
        scores = (self.q(x) @ self.k(x).transpose(1, 2)).tril().softmax(-1)
        result: Tensor = self.o(scores @ self.v(x))
        return result


class TokenModel(nn.Module):
    """Embedding, attention, the blocks, and a head; every one but the last adds to the stream."""

    def __init__(self, *blocks: nn.Module, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.attention = nn.Embedding(VOCABULARY, width), Attention(width)
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(width, VOCABULARY)
        self.config = SimpleNamespace(hidden_size=width)

    def get_input_embeddings(self) -> nn.Module:
        """As transformers' models have it."""
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        """An object with `logits`."""
        x = self.embedding(input_ids)
        x = x + self.attention(x)
        for block in self.blocks:
            x = x + block(x)
        return SimpleNamespace(logits=self.head(x))


class Block(nn.Module):
    """Named modules, and a function of them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        """What the function says."""
        return self.run(self, x)
