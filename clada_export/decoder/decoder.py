"""`Decoder`: the model that is compiled, as every stage sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clada_export.decoder.digest import state, weights_digest
from clada_export.decoder.ffn import EagerFFN, EagerFFNs, SkippedFFN
from clada_export.decoder.model_config import text_config_of
from clada_export.decoder.tap import FFNTap, Inner, Outer, Replace
from clada_export.errors import UnsupportedModelError


@dataclass(frozen=True)
class DecoderOutput:
    """`logits` [batch, sequence, vocabulary]; `cache` goes into the next call as it is, None where it was not asked for."""

    logits: Tensor
    cache: Any


class Decoder(ABC):
    """A language model that runs on token ids, and whose FFNs can be seen and replaced while it does.

    Weights may change in place (pruning, adapters, rounding); what the attributes say stays true then, so it is found out once.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages call it."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """What holds the weights that can be changed; its state dict tells this decoder from every other."""

    @property
    @abstractmethod
    def config(self) -> Any:
        """The model's configuration, of transformers."""

    @property
    @abstractmethod
    def generation_config(self) -> Any:
        """The model's defaults for generation, of transformers, or None."""

    @property
    @abstractmethod
    def differentiable(self) -> bool:
        """Whether gradients flow back through it."""

    @property
    @abstractmethod
    def takes_positions(self) -> bool:
        """Whether it can be told the positions of its tokens."""

    @property
    @abstractmethod
    def first_position(self) -> int:
        """The position that it gives the first token of a text by itself (`clada_export.decoder.positions`)."""

    @property
    @abstractmethod
    def padding(self) -> str:
        """One of `PADDINGS`: what a row gives when it is padded on the left (`clada_export.decoder.padding`)."""

    @abstractmethod
    def run(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        keep_cache: bool = False,
    ) -> DecoderOutput:
        """Run tokens, through the FFNs that can be tapped.

        Args:
            ids: int64 [batch, sequence].
            mask: int64 [batch, past + sequence], 0 for padding; None for none.
            positions: int64 [1 or batch, sequence], where it takes them; None lets it count.
            cache: of an earlier call; a call may change it.
            keep_cache: return the cache.
        """

    def run_whole(
        self, ids: Tensor, *, positions: Tensor | None = None, cache: Any = None, keep_cache: bool = False
    ) -> DecoderOutput:
        """As `run`, but in one piece where the decoder was cut up so that its FFNs can be tapped: what taps do is not seen."""
        return self.run(ids, positions=positions, cache=cache, keep_cache=keep_cache)

    @abstractmethod
    def _search(self) -> EagerFFNs:
        """Find the FFNs."""

    @cached_property
    def _found(self) -> EagerFFNs:
        return self._search()

    @property
    def ffns(self) -> tuple[EagerFFN, ...]:
        """Its dense FFNs, in the order in which they run.

        Raises:
            UnsupportedModelError: the model does not run on token ids alone.
        """
        return self._found.found

    @property
    def skipped(self) -> tuple[SkippedFFN, ...]:
        """The FFNs that stay as they are, and why."""
        return self._found.skipped

    def require_ffns(self) -> tuple[EagerFFN, ...]:
        """`ffns`, but at least one.

        Raises:
            UnsupportedModelError: no dense FFN was found; lists what was seen and why it does not count.
        """
        if not self.ffns:
            reasons = "; ".join(f"{item.name}: {item.reason}" for item in self.skipped[:4]) or "no module looks like one"
            raise UnsupportedModelError(f"{self.name}: no feed-forward layer that could be compiled ({reasons})")
        return self.ffns

    def rest(self) -> None:
        """Give the memory of the weights back, where that can be done: for stages that are done with them for a while.

        They stay what they are, and are read again when they are next used. Here it does nothing.
        """
        return

    def used(self, weight: Tensor) -> None:
        """Say that a weight was read or changed as a whole, and will not be for a while: of a large model it rests.

        Who goes over all weights says so of each, so that they are never in memory all at once.
        """
        return

    def weights_digest(self) -> str:
        """What tells its weights from those of every other (`clada_export.decoder.digest`).

        Hashed again only if PyTorch has written to a weight since.
        """
        now = state(self.module)
        kept: tuple[Any, str] | None = vars(self).get("_digest")
        if kept is None or now is None or kept[0] != now:
            kept = vars(self)["_digest"] = now, weights_digest(self.module, self.used)
        return kept[1]

    @property
    def vocab_size(self) -> int:
        """How many token ids it takes: 0 to this number less one."""
        return int(text_config_of(self.config).vocab_size)

    @property
    def sequence_limit(self) -> int | None:
        """The longest sequence in tokens that it takes, or None if it does not say."""
        config = text_config_of(self.config)
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        # Embeddings of positions that a text never has are in the number.
        return limit - self.first_position if isinstance(limit, int) else None

    @property
    def attention_scales(self) -> frozenset[float]:
        """The factors of the scores of its attention layers, as far as it says them."""
        # transformers keeps them as `scaling`.
        found = (getattr(module, "scaling", None) for module in self.module.modules())
        return frozenset(scale for scale in found if isinstance(scale, float))

    def tap(
        self,
        *,
        inner: Inner | None = None,
        outer: Outer | None = None,
        replace: Replace | None = None,
        only: Sequence[EagerFFN] | None = None,
    ) -> FFNTap:
        """See `FFNTap`.

        Args:
            only: some of the decoder's FFNs; an index is then a place in these. None taps all.
        """
        return FFNTap(self.ffns if only is None else only, inner=inner, outer=outer, replace=replace)

    def logits(self, window: Tensor) -> Tensor:
        """Logits [T, V] of one text, int64 [T]."""
        return self.run(window[None]).logits[0]

    def dense_logits(self, row: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits [T, V] of one row alone, in one piece: every token is one of the text, padding token or not."""
        with torch.inference_mode():
            output = self.run_whole(torch.tensor([list(row)]), positions=self.counted(len(row)))
            return output.logits[0].float().numpy()

    def counted(self, length: int, past: int = 0) -> Tensor | None:
        """What tells it that each of `length` tokens after `past` is one of the text, padding token or not.

        Returns:
            Positions, int64 [1, length]; None for a decoder that counts so by itself.
        """
        first = self.first_position
        return torch.arange(first + past, first + past + length)[None] if first else None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No weight wants a gradient meanwhile."""
        parameters = list(self.module.parameters())
        wanted = [parameter.requires_grad for parameter in parameters]
        self.module.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, flag in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(flag)
