"""Weights go into a spool as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clada_export.decoder.spool import Spool, room
from clada_export.patches.transformers_loading import weights_placed


@contextmanager
def placed_in(spool: Spool, dtype: torch.dtype) -> Iterator[None]:
    """Let `from_pretrained` put each weight into a spool before it reads the next.

    Args:
        dtype: what it is told to make of them.

    Raises:
        UsageError: there is no room on the disk.
    """

    def place(model: PreTrainedModel, value: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            return value
        if not _alone(value) or not spool.holds(value):
            if not spool.size:
                reserve(spool, model, dtype)
            value = spool.copy(value)
        spool.used(value)
        return value

    with weights_placed(place):
        yield


def reserve(spool: Spool, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Take room for a model's weights before any is read.

    Args:
        model: may be without memory.
        dtype: what its weights of floating point will be.

    Raises:
        UsageError: there is none.
    """
    # Of tied weights one is stored, as a rule; where both are, the spool grows.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    weights = {id(item): item for name, item in model.state_dict(keep_vars=True).items() if name not in tied}.values()
    spool.reserve(room((item.numel(), dtype.itemsize if item.is_floating_point() else item.element_size()) for item in weights))


def _alone(value: Tensor) -> bool:
    """Whether nothing else lies in its storage, and it is all there."""
    return value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
