"""`TorchDecoder`: a decoder of transformers, run by PyTorch."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from clada_export.decoder.decoder import Decoder, DecoderOutput
from clada_export.decoder.ffn import EagerFFNs, find_eager_ffns, on_copy
from clada_export.decoder.padding import padding_of
from clada_export.decoder.positions import first_position
from clada_export.decoder.residency import Residency
from clada_export.decoder.rounding import in_dtype
from clada_export.errors import UsageError


class TorchDecoder(Decoder):
    """A model of transformers in eval mode.

    Args:
        model: run on token ids; stages that change or trace its modules take it from here.
        ffns: its FFNs, where they are known; None searches for them when they are first asked for.
        residency: of its weights, where they lie in a spool; None leaves them in memory.
    """

    def __init__(self, model: PreTrainedModel, ffns: EagerFFNs | None = None, residency: Residency | None = None) -> None:
        self.model = model
        self._known = ffns
        self._residency = residency

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self.model).__name__

    @property
    def module(self) -> PreTrainedModel:
        """The model."""
        return self.model

    @property
    def config(self) -> Any:
        """See `Decoder.config`."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """See `Decoder.generation_config`."""
        return self.model.generation_config

    @property
    def differentiable(self) -> bool:
        """Always."""
        return True

    @property
    def takes_positions(self) -> bool:
        """See `Decoder.takes_positions`."""
        return "position_ids" in inspect.signature(self.model.forward).parameters

    @cached_property
    def first_position(self) -> int:
        """See `Decoder.first_position`."""
        return first_position(self)

    @cached_property
    def padding(self) -> str:
        """See `Decoder.padding`; of whole sequences, and of steps that go on from a cache."""
        return padding_of(self, cached=True)

    def run(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        keep_cache: bool = False,
    ) -> DecoderOutput:
        """See `Decoder.run`."""
        # Not every model has every argument, so none is named that was not given.
        given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        given = {name: value for name, value in given.items() if value is not None}
        output = self.model(input_ids=ids, use_cache=keep_cache, **given)
        return DecoderOutput(output.logits, output.past_key_values if keep_cache else None)

    def rest(self) -> None:
        """See `Decoder.rest`."""
        if self._residency is not None:
            self._residency.rest()

    def used(self, weight: Tensor) -> None:
        """See `Decoder.used`."""
        if self._residency is not None:
            self._residency.spool.used(weight)

    def in_dtype(self, dtype: str) -> TorchDecoder:
        """A copy whose parameters have another type (`clada_export.decoder.rounding.in_dtype`), with the same FFNs.

        It lies in a spool where this one does.

        Args:
            dtype: `float16` or `bfloat16`.

        Raises:
            UsageError: there is no room on the disk for it.
        """
        spool = None if self._residency is None else self._residency.spool.beside()
        copy = in_dtype(self.model, dtype, spool)
        # Rounding makes activations alike, so the copy is not searched again.
        residency = None if spool is None else Residency(copy, spool)
        return TorchDecoder(copy, EagerFFNs(on_copy(self.ffns, self.model, copy), self.skipped), residency)

    def _search(self) -> EagerFFNs:
        return find_eager_ffns(self.model) if self._known is None else self._known


def require_torch(decoder: Decoder, what: str) -> TorchDecoder:
    """The decoder as one of PyTorch, for what needs its modules.

    Args:
        what: needs them, for the message.

    Raises:
        UsageError: it is another kind of decoder.
    """
    if not isinstance(decoder, TorchDecoder):
        raise UsageError(f"{what} needs the PyTorch model, and {decoder.name} is none; give that")
    return decoder
