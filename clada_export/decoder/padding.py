"""Whether a model gives a row the same result when it is padded on the left, as a batch of rows of different lengths is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from clada_export.artifact.manifest import PADDINGS
from clada_export.decoder.positions import first_position, sample_tokens, takes_positions

LEFT, NONE = PADDINGS
SAME = 1e-3
"""Of the largest logit. Rounding is a hundredth of it. A model that counts padding as positions is off by as much as 1; one
whose mask only lowers the scores of padding is off by little, and still by more than an engine may be."""
_TOKENS, _PADDING = 8, 3


def padding_of(model: nn.Module) -> str:
    """`left` or `none`, by one row alone and padded.

    Args:
        model: takes `input_ids`, `attention_mask` and, if it says so, `position_ids`; `config.vocab_size` is set.
    """
    ids = sample_tokens(model, _TOKENS)
    padded = torch.cat((torch.zeros((1, _PADDING), dtype=torch.int64), ids), 1)
    mask = torch.cat((torch.zeros((1, _PADDING), dtype=torch.int64), torch.ones_like(ids)), 1)
    inputs: dict[str, Tensor] = {"input_ids": padded, "attention_mask": mask}
    if takes_positions(model):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + first_position(model)
    with torch.inference_mode():
        wanted = model(input_ids=ids, use_cache=False).logits
        found = model(**inputs, use_cache=False).logits[:, _PADDING:]
        if isinstance(model, PreTrainedModel):
            # A mask can be right for a whole sequence and wrong for one that goes on from a cache.
            later = _after_a_cache(model, inputs)
            found = torch.cat((found[:, : -later.shape[1]], later), 1)
    return LEFT if float((wanted - found).abs().max()) <= SAME * float(wanted.abs().max()) else NONE


def _after_a_cache(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the second half of the tokens, run after the first half."""
    middle = _PADDING + _TOKENS // 2
    first = {name: value[:, :middle] for name, value in inputs.items()}
    # The mask is of the cache and what comes after it; all else is of what comes after it.
    second = {name: value if name == "attention_mask" else value[:, middle:] for name, value in inputs.items()}
    run: Any = model
    past = run(**first, use_cache=True).past_key_values
    logits: Tensor = run(**second, past_key_values=past, use_cache=True).logits
    return logits
