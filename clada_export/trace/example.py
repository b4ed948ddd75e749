"""The step that is traced: tokens that go on from a past, with padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model
from transformers.exporters.utils import decompose_for_generation, prepare_for_export

from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UnsupportedModelError
from clada_export.patches.torch_pytree import children
from clada_export.trace.quiet import first_line, quiet

BATCH, TOKENS, PADDING = 2, 8, 3
"""Two rows, so that the batch stays dynamic, the second with padding, so that the mask is an input."""

AUTO = torch.export.Dim.AUTO


@dataclass(frozen=True)
class Example:
    """What the exporter is given.

    Attributes:
        component: the model, as the exporter of transformers prepared it.
        inputs: of its `forward`, by name.
        shapes: which of their axes vary, in the exporter's form.
    """

    component: nn.Module
    inputs: dict[str, Any]
    shapes: dict[str, Any]


def make_example(decoder: TorchDecoder, layers: int | None = None) -> Example:
    """A step that goes on with several tokens from a past: the general case of prompt and decode.

    Args:
        layers: how many layers the model has at present, if not as many as its configuration says.

    Raises:
        UnsupportedModelError: the model can't take such a step, or its cache is not made of keys and values; says why.
    """
    size = decoder.vocab_size
    low = 3 if size > 8 else 0
    ids = torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) % (size - low) + low
    mask = torch.ones_like(ids)
    mask[-1, :PADDING] = 0
    with quiet():
        try:
            given = {"input_ids": ids, "attention_mask": mask}
            parts = decompose_for_generation(decoder.model, given, multi_token_decode=True)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, NotImplementedError) as error:
            why = first_line(error)
            raise UnsupportedModelError(f"{decoder.name}: a step with a cache can't be captured: {why}") from error
    if "decode" not in parts:
        raise UnsupportedModelError(f"{decoder.name}: it has no decode step; parts found: {', '.join(parts)}")
    component, inputs = parts["decode"]
    cache = inputs.get("past_key_values")
    if isinstance(cache, DynamicCache) and layers is not None and not any(map(_is_filled, cache.layers[layers:])):
        # It was made for as many layers as the configuration says.
        del cache.layers[layers:]
    if not isinstance(cache, DynamicCache) or not all(map(_is_filled, cache.layers)):
        raise UnsupportedModelError(
            f"{decoder.name}: its cache ({type(cache).__name__}) is not made of keys and values of every layer"
        )
    return Example(component, dict(inputs), _dynamic_shapes(component, dict(inputs)))


def _is_filled(layer: object) -> bool:
    return all(isinstance(getattr(layer, name, None), Tensor) for name in ("keys", "values"))


def _dynamic_shapes(component: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Mark the axes that vary and no others: batch and length. All other axes then are numbers, and tracing is faster."""
    _, used, _ = prepare_for_export(component, dict(inputs))
    register_cache_pytrees_for_model(component)  # type: ignore[arg-type]
    return {key: _axes(value) for key, value in used.items()}


def _axes(value: Any) -> Any:
    if isinstance(value, Tensor):
        # Keys and values are [batch, heads, past, head_dim]; a count that a layer keeps is a scalar.
        axes = (0, 2) if value.dim() == 4 else tuple(range(min(value.dim(), 2)))
        return dict.fromkeys(axes, AUTO)
    if isinstance(value, DynamicCache):
        return [_nested_axes(child) for child in children(value)]
    return None


def _nested_axes(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_nested_axes(item) for item in value)
    if isinstance(value, dict):
        return {key: _nested_axes(item) for key, item in value.items()}
    return _axes(value)
