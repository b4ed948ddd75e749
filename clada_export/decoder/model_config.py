"""The settings of the decoder in a model's configuration: a model of text and images keeps those of its text apart."""

from __future__ import annotations

from typing import Any

from torch import nn


def text_config(model: nn.Module) -> Any:
    """The configuration of the decoder: the model's own, or the part of it that is about text; None if the model has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def vocab_size(model: nn.Module) -> int:
    """How many token ids the model takes: 0 to this number less one."""
    return int(text_config(model).vocab_size)
