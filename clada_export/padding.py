"""Whether a model gives a row the same result when it is padded on the left, as a batch of rows of different lengths is."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from clada_export.manifest import PADDINGS

LEFT, NONE = PADDINGS
SAME = 1e-2
"""Of the largest logit. Rounding is a thousandth of it, and a model that counts padding as positions is off by as much as 1."""
_TOKENS, _PADDING = 8, 3


def padding_of(model: nn.Module) -> str:
    """`left` or `none`, by one row alone and padded.

    Args:
        model: takes `input_ids`, `attention_mask` and, if it says so, `position_ids`; `config.vocab_size` is set.
    """
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    ids = torch.randint(0, vocabulary, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    padded = torch.cat((torch.zeros((1, _PADDING), dtype=torch.int64), ids), 1)
    mask = torch.cat((torch.zeros((1, _PADDING), dtype=torch.int64), torch.ones_like(ids)), 1)
    inputs: dict[str, Tensor] = {"input_ids": padded, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        wanted = model(input_ids=ids, use_cache=False).logits
        found = model(**inputs, use_cache=False).logits[:, _PADDING:]
    return LEFT if float((wanted - found).abs().max()) <= SAME * float(wanted.abs().max()) else NONE
