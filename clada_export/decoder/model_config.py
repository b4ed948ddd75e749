"""The settings of the decoder in a model's configuration: a model of text and images keeps those of its text apart."""

from __future__ import annotations

from typing import Any

from torch import nn


def text_config_of(config: Any) -> Any:
    """The part of a configuration that is about the decoder: itself, or what it says of text; None of None."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's decoder; None if the model has none."""
    return text_config_of(getattr(model, "config", None))
